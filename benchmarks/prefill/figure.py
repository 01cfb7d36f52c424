"""Prefill time against skipped layers, beside token dropping, as PNG and SVG."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from figures.style import legend_below, machine, paper, plain, saved

Row = dict[str, Any]

# Okabe and Ito's palette, as in the sweep's figures
_COLORS = {
    "shortv": "#D55E00",
    "naavit": "#009E73",
    "ima_skip": "#CC79A7",
    "uniform": "#0072B2",
    "todre": "#56B4E9",
    "todre, stage 2": "#332288",
}
_MARKERS = {"uniform": "s", "todre": "^", "todre, stage 2": "D"}
_LABELS = {
    "shortv": "shortv: visual rows skip both",
    "naavit": "naavit: they skip attention",
    "ima_skip": "ima_skip: they skip the FFN",
    "uniform": "uniform: dropped before the LLM",
    "todre": "todre: before it, the rest at 7/8 of it",
    "todre, stage 2": "todre, stage 2 alone: all at 7/8 of it",
}


def prefill_plot(rows: Sequence[Row]) -> dict[str, bytes]:
    """A line of panels for each size and batch: against skipped layers, against layer-averaged
    active visual tokens, and against the FLOPs of the prefill.

    Args:
        rows: of `prefill_layers.py`.

    Returns:
        The files' contents by ending: `png` and `svg`.
    """
    from matplotlib.ticker import MaxNLocator

    cases = list(dict.fromkeys((row["size"], row["batch"]) for row in rows))
    figure = paper(15, 4.2 * len(cases) + 0.8)
    grid = figure.subplots(len(cases), 3, sharey="row", squeeze=False)
    for (size, batch), (left, middle, right) in zip(cases, grid, strict=True):
        own = [row for row in rows if (row["size"], row["batch"]) == (size, batch)]
        _panel(left, [row for row in own if row["kind"] != "dropping"], "layers_skipped")
        _panel(middle, own, "layer_mean_tokens")
        _panel(right, own, "flops", 1e12)
        first = own[0]
        prompts = "one prompt" if batch == 1 else f"{batch} prompts"
        left.set_title(f"{size}, {prompts}", loc="left", fontsize=11)
        left.set_ylabel("LLM prefill, ms (median, p20 to p80)")
        left.set_xlabel(f"decoder layers of {first['config']['layers']} that visual rows skip")
        left.xaxis.set_major_locator(MaxNLocator(integer=True))
        middle.set_xlabel(f"visual tokens active, mean over layers, of {first['visual_tokens']}")
        right.set_xlabel("TFLOP from the embeddings to the first logits")
        left.set_ylim(bottom=0)
    legend_below(figure, grid.flat, 3)
    figure.suptitle(machine(rows[0]), fontsize=9, x=0.01, ha="left", color="#555555")
    return saved(figure)


def _panel(axes: Any, rows: Sequence[Row], x: str, unit: float = 1.0) -> None:
    for name, color in _COLORS.items():
        own = sorted((row for row in rows if row["provider"] == name), key=lambda row: row[x])
        if not own:
            continue
        times = [row["prefill_ms"] for row in own]
        axes.errorbar(
            [row[x] / unit for row in own],
            times,
            yerr=(
                [t - row["prefill_ms_p20"] for t, row in zip(times, own, strict=True)],
                [row["prefill_ms_p80"] - t for t, row in zip(times, own, strict=True)],
            ),
            color=color,
            marker=_MARKERS.get(name, "o"),
            ms=5,
            lw=1.6,
            elinewidth=0.9,
            capsize=2,
            label=_LABELS[name],
        )
    for row in rows:
        if row["kind"] == "stock":
            axes.axhline(row["prefill_ms"], color="black", lw=1, ls=(0, (6, 2)), label="stock")
    plain(axes)
