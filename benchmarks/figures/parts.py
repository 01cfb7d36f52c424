"""Where the time to the first logits goes, above the least that it could be."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from figures.style import GRAY, PARTS, Row, legend_below, machine, paper, plain, saved, titled
from vtc.bench.providers import ROUTES

SHOWN = ("stock", "vtc_cls", "todre", "flowcut")
_BAR, _FLOOR = 0.46, 0.2


def parts_plot(rows: Sequence[Row]) -> dict[str, bytes]:
    """A panel for each model and batch: a bar for each way to run it, and under it the floor.

    Args:
        rows: of `ttft.py`.
    """
    cases = chosen(rows)
    columns = 2
    lines = -(-(len(cases) + 1) // columns)
    tallest = max(map(len, cases.values()))
    figure = paper(15, lines * (0.42 * tallest + 1.3) + 1.4)
    grid = figure.subplots(lines, columns, squeeze=False).flatten()
    for axes, ((model, batch), own) in zip(grid, cases.items(), strict=False):
        prompts = "one prompt" if batch == 1 else f"{batch} prompts"
        axes.set_title(f"{model}, {prompts}", loc="left", fontsize=11)
        axes.set_xlabel("ms to the first logits (median)")
        _bars(axes, [(_name(row), _times(row), _floors(row)) for row in own])
    decoding = [row for row in rows if row.get("tpot_ms") is not None]
    axes = grid[len(cases)]
    if decoding:
        axes.set_title(f"{decoding[0]['model']}, a later token", loc="left", fontsize=11)
        axes.set_xlabel("ms per token (mean of a whole generate)")
        steps = [
            (_name(r), {"decode": r["tpot_ms"]}, {"decode": r["floor_ms"]["decode"]})
            for r in decoding
        ]
        _bars(axes, steps)
    for empty in grid[len(cases) + bool(decoding) :]:
        empty.set_visible(False)
    legend_below(figure, grid, 4)
    first = next(iter(cases.values()))[0]
    titled(
        figure, "Where the time goes; below each bar the floor at measured ceilings", machine(first)
    )
    return saved(figure)


def chosen(rows: Sequence[Row]) -> dict[tuple[str, int], list[Row]]:
    """By model and batch the stock model and three methods at their smallest budget."""
    found: dict[tuple[str, int], list[Row]] = {}
    for row in rows:
        if row["method"] in SHOWN and "prefill_ms" in row and row["attention"] == "sdpa":
            found.setdefault((row["model"], row["batch"]), []).append(row)
    for at, own in found.items():
        smallest = {
            m: min(r["keep"] for r in own if r["method"] == m)
            for m in {r["method"] for r in own if r["keep"] is not None}
        }
        own = [r for r in own if r["keep"] == smallest.get(r["method"])]
        found[at] = sorted(own, key=lambda r: (SHOWN.index(r["method"]), ROUTES.index(r["path"])))
    return found


def _name(row: Row) -> str:
    kept = "" if row["keep"] is None else f" → {row['keep']}"
    return f"{row['method']}{kept}, {row['path']}"


def _times(row: Row) -> dict[str, float]:
    """Of each part; what the method adds as far as it is known apart."""
    steps = {name: row.get(f"{name}_ms") or 0.0 for name in ("score", "select", "gather")}
    rest = max(0.0, (row["selector_ms"] or 0.0) - sum(steps.values()))
    encoder = {"encoder": row["encoder_ms"]}
    return {**encoder, **steps, "selection": rest, "prefill": max(0.0, row["prefill_ms"])}


def _floors(row: Row) -> dict[str, float]:
    gather = 0.0 if row["method"] == "stock" else row["floor_ms"]["gather"]
    floor = row["floor_ms"]
    return {"encoder": floor["encoder"], "gather": gather, "prefill": floor["prefill"]}


_LABELS = {
    "encoder": "encoder, with the rows read off it",
    "score": "score",
    "select": "select",
    "gather": "gather",
    "selection": "all of what the method adds; beside score, select and gather: between them",
    "prefill": "prefill",
    "decode": "decode",
}


def _bars(axes: Any, bars: Sequence[tuple[str, dict[str, float], dict[str, float]]]) -> None:
    for y, (_, times, floors) in enumerate(bars):
        _stack(axes, y - 0.12, _BAR, times, 1.0)
        _stack(axes, y + 0.25, _FLOOR, floors, 0.45)
        total, floor = sum(times.values()), sum(floors.values())
        text = f" {total:.1f} ms, {total / floor:.1f}× the floor"
        axes.text(total, y - 0.12, text, va="center", fontsize=8.5, color=GRAY)
    axes.set_yticks(range(len(bars)), [name for name, _, _ in bars], fontsize=9)
    axes.invert_yaxis()
    longest = max(sum(times.values()) for _, times, _ in bars)
    axes.set_xlim(0, longest * 1.42)
    plain(axes)
    axes.grid(axis="y", visible=False)


def _stack(axes: Any, y: float, height: float, parts: dict[str, float], alpha: float) -> None:
    left = 0.0
    for name, value in parts.items():
        if value <= 0:
            continue
        axes.barh(
            y,
            value,
            height,
            left=left,
            color=PARTS[name],
            alpha=alpha,
            hatch="////" if name == "selection" else None,
            edgecolor="white" if alpha == 1 else PARTS[name],
            lw=0.5,
            label=_LABELS[name] if alpha == 1 else "paler: the floor of the same part",
        )
        left += value
