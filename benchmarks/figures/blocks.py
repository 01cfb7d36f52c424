"""What methods that save work inside the encoder leave of it, block by block."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from figures.style import Row, machine, paper, plain, saved, titled
from vtc.bench.families import SHAPES, tiny
from vtc.bench.floor import blocks
from vtc.bench.shapes import Shape

_STYLES = {"stock": ("black", "o"), "flowcut": ("#D55E00", "s"), "downsample": ("#0072B2", "^")}


def block_plot(rows: Sequence[Row]) -> dict[str, bytes] | None:
    """Of each model the patches, FLOPs and milliseconds of each block; None where no method that
    cuts there was measured.

    Args:
        rows: of `ttft.py`.
    """
    cases = _cases(rows)
    if not cases:
        return None
    figure = paper(4.6 * len(cases) + 1, 9.2)
    grid = figure.subplots(3, len(cases), squeeze=False, sharex="col")
    for column, ((model, batch), own) in zip(grid.T, cases.items(), strict=True):
        shape = shape_of(model)
        prompts = "" if batch == 1 else f", {batch} prompts"
        column[0].set_title(f"{model}{prompts}", loc="left", fontsize=11)
        for row in own:
            _lines(column, row, shape, batch, own)
        for axes in column:
            axes.set_ylim(bottom=0)
            plain(axes)
        column[0].legend(loc="lower left", bbox_to_anchor=(0, 0.12), fontsize=8.5, frameon=False)
        column[2].set_xlabel("encoder block")
    names = ("patches", "GFLOP", "ms, eager, with what is\ndecided behind the block")
    for axes, name in zip(grid[:, 0], names, strict=True):
        axes.set_ylabel(name)
    first = next(iter(cases.values()))[0]
    titled(figure, "What is left of the encoder's work, block by block", machine(first))
    return saved(figure)


def _cases(rows: Sequence[Row]) -> dict[tuple[str, int], list[Row]]:
    found: dict[tuple[str, int], list[Row]] = {}
    for row in rows:
        shown = row["method"] in _STYLES and row["path"] == "eager" and "ttft_ms" in row
        if shown and row["attention"] == "sdpa":
            found.setdefault((row["model"], row["batch"]), []).append(row)
    out = {}
    for at, own in found.items():
        if {r["method"] for r in own} <= {"stock"}:
            continue
        keeps = [r["keep"] for r in own if r["keep"] is not None]
        out[at] = [r for r in own if r["keep"] in (None, min(keeps))]
    return out


def shape_of(model: str) -> Shape:
    """The shape of a row, or its toy."""
    toys = {tiny(shape).name: tiny(shape) for shape in SHAPES.values()}
    return SHAPES.get(model) or toys[model]


def patches(row: Row, shape: Shape, batch: int) -> list[float]:
    """Through each block, over all rows."""
    crops, long = shape.patches
    whole = float(batch * crops * long)
    if row.get("block_patches"):
        return [float(n) for n in row["block_patches"]]
    share = 1.0
    if row["method"] == "downsample":
        share = row["layer_mean_tokens"] / shape.visual
    return [whole * share] * shape.tower.blocks


def _lines(column: Any, row: Row, shape: Shape, batch: int, own: Sequence[Row]) -> None:
    through = patches(row, shape, batch)
    one_crop = row["method"] == "downsample"
    work = blocks(shape, batch, through, batch if one_crop else None)
    stock = blocks(shape, batch, patches(own[0] | {"method": "stock"}, shape, batch))
    share = sum(w.flops for w in work) / sum(w.flops for w in stock)
    color, marker = _STYLES[row["method"]]
    kept = "" if row["keep"] is None else f" → {row['keep']}: {share:.0%} of the FLOPs"
    label = row["method"] + kept
    series = [through, [w.flops / 1e9 for w in work], row.get("block_ms")]
    for axes, values in zip(column, series, strict=True):
        if values:
            axes.plot(values, color=color, marker=marker, ms=3.5, lw=1.5, label=label)
