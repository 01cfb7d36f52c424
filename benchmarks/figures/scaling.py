"""Time and memory against images and against prompts, with the point where memory ends."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from figures.style import GRAY, Row, legend_below, machine, paper, plain, saved, titled

_STYLES = {
    ("stock", "eager"): ("black", "o", "stock"),
    ("vtc", "eager"): ("#56B4E9", "^", "eager"),
    ("vtc", "fast"): ("#0072B2", "s", "fast"),
    ("vtc", "compile"): ("#009E73", "D", "compiled"),
}
_AXES = {"images": "images in one prompt", "batch": "prompts of one image"}


def scale_plot(rows: Sequence[Row]) -> dict[str, bytes]:
    """Two lines of panels: time to the first logits, and peak memory.

    Args:
        rows: of `scale.py`, of one model.
    """
    axes_names = [axis for axis in _AXES if any(row["axis"] == axis for row in rows)]
    figure = paper(6.4 * len(axes_names) + 1, 9)
    grid = figure.subplots(2, len(axes_names), squeeze=False, sharex="col", sharey="row")
    for column, axis in zip(grid.T, axes_names, strict=True):
        own = [row for row in rows if row["axis"] == axis]
        _curves(column[0], own, axis, "ttft_ms", 1.0)
        _curves(column[1], own, axis, "peak_memory_bytes", 2**30)
        column[0].set_yscale("log")
        column[0].set_title(_AXES[axis], loc="left", fontsize=11)
        column[1].set_xlabel(_AXES[axis])
        _memory(column, own, axis)
        points = sorted({row[axis] for row in own})
        for axes in column:
            axes.set_xscale("log", base=2)
            axes.set_xticks(points, [str(n) for n in points])
            axes.minorticks_off()
            plain(axes)
    grid[0, 0].set_ylabel("ms to the first logits (median, p20 to p80)")
    grid[1, 0].set_ylabel("peak memory, GiB")
    grid[1, 0].set_ylim(bottom=0)
    legend_below(figure, grid.flatten(), 5)
    first = rows[0]
    what = f"How {first['model']} scales, {first['visual_tokens']:,} visual tokens an image"
    titled(figure, what, machine(first))
    return saved(figure)


def _key(row: Row) -> tuple[str, str]:
    return ("stock" if row["method"] == "stock" else "vtc"), row["path"]


def _curves(axes: Any, rows: Sequence[Row], axis: str, name: str, unit: float) -> None:
    for key, (color, marker, label) in _STYLES.items():
        own = [r for r in rows if _key(r) == key and r.get(name) is not None]
        own.sort(key=lambda r: r[axis])
        if not own:
            continue
        if key[0] != "stock":
            label = f"{own[0]['method']} → {own[0]['keep']}, {label}"
        values = [r[name] / unit for r in own]
        spread = None
        if f"{name}_p20" in own[0]:
            low = [v - r[f"{name}_p20"] / unit for v, r in zip(values, own, strict=True)]
            high = [r[f"{name}_p80"] / unit - v for v, r in zip(values, own, strict=True)]
            spread = [low, high]
        at = [r[axis] for r in own]
        axes.errorbar(
            at,
            values,
            yerr=spread,
            color=color,
            marker=marker,
            ms=5,
            lw=1.6,
            capsize=2,
            label=label,
        )


def _memory(column: Any, rows: Sequence[Row], axis: str) -> None:
    """Where each way runs out of memory, and how much there is."""
    whole = next((r["device_memory_bytes"] for r in rows if r.get("device_memory_bytes")), None)
    if whole is not None:
        column[1].axhline(
            whole / 2**30, color=GRAY, lw=1, ls=(0, (4, 3)), label="the device's memory"
        )
    for key, (color, _, label) in _STYLES.items():
        over = [r[axis] for r in rows if _key(r) == key and r.get("failed") == "out of memory"]
        if not over:
            continue
        name = label if key[0] == "stock" else f"compressed, {label}"
        for axes in column:
            axes.axvline(min(over), color=color, lw=1, ls=":")
        column[0].annotate(
            f"{name}: out of memory at {min(over)}",
            (min(over), 0.02),
            xycoords=("data", "axes fraction"),
            xytext=(-4, 2),
            textcoords="offset points",
            ha="right",
            fontsize=8.5,
            color=color,
            rotation=90,
            va="bottom",
        )
        if whole is not None:
            column[1].plot(
                min(over),
                whole / 2**30,
                marker="X",
                ms=11,
                color=color,
                ls="",
                label=f"{name}: out of memory",
            )
