"""Accuracy against the share of tokens kept, as PNG and SVG."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from typing import Any

from vtc.evaluation.table import FULL, Row, curves

# Okabe and Ito's palette: told apart with any color vision, and by brightness on gray paper
_COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#332288", "#000000")
# baselines stay in the background, and apart from all of these
_FIXED = {
    "random": "#777777",
    "uniform": "#A6A6A6",
    "average_pool": "#8C6D46",
    "downsample": "#E69F00",
}
_MARKERS = {"random": "s", "uniform": "^", "average_pool": "D", "downsample": "v"}
# points of one budget would hide each other's intervals: each curve is moved by this much
_DODGE = 0.012


def accuracy_plot(summary: Sequence[Row], chance: Mapping[str, float]) -> dict[str, bytes]:
    """The plot of every task, one panel each.

    Args:
        summary: rows with seeds averaged.
        chance: accuracy by guessing of each task, where known.

    Returns:
        The files' contents by ending: `png` and `svg`.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    tasks = list(dict.fromkeys(row["task"] for row in summary))
    # a figure of its own, not pyplot's: nothing global changes in the caller's process
    figure = Figure(figsize=(8, 5.8 * len(tasks)), layout="constrained")
    FigureCanvasAgg(figure)
    for i, task in enumerate(tasks):
        axes = figure.add_subplot(len(tasks), 1, i + 1)
        _panel(axes, task, [row for row in summary if row["task"] == task], chance.get(task))
    return {ending: _file(figure, ending) for ending in ("png", "svg")}


def _file(figure: Any, ending: str) -> bytes:
    import matplotlib

    buffer = io.BytesIO()
    # no date and a fixed salt: the same table gives the same file
    metadata = {"Software": None} if ending == "png" else {"Date": None, "Creator": None}
    with matplotlib.rc_context({"svg.hashsalt": "vtc"}):
        figure.savefig(buffer, format=ending, dpi=160, metadata=metadata)
    return buffer.getvalue()


def _panel(axes: Any, task: str, rows: Sequence[Row], chance: float | None) -> None:
    found = curves(rows)
    labels = list(dict.fromkeys(label for _, label, _ in found))
    others = iter(_COLORS)
    colors = {label: _FIXED.get(label) or next(others, "#000000") for label in labels}
    for i, ((_, label, positions), points) in enumerate(found.items()):
        dodge = 1 + _DODGE * (i - (len(found) - 1) / 2)
        _curve(axes, label, positions, points, colors[label], dodge)
    for full in (row for row in rows if row["method"] == FULL):
        accuracy, (low, high) = 100 * full["accuracy"], _interval(full)
        axes.axhline(accuracy, color="black", lw=1, ls=(0, (6, 2)), label="full model")
        axes.axhspan(low, high, color="black", alpha=0.06, lw=0)
        axes.plot([full["kept_fraction"]], [accuracy], "*", color="black", ms=11, zorder=4)
    if chance is not None:
        axes.axhline(100 * chance, color="black", lw=1, ls=":", label="guessing")
    _frame(axes, task, rows)
    # below the axes: inside, some curve or line always runs through it
    axes.legend(fontsize=9, frameon=False, ncols=3, loc="upper center", bbox_to_anchor=(0.5, -0.13))


def _interval(row: Row) -> tuple[float, float]:
    """In percent; without width where there was one question."""
    value = row["accuracy"]
    low, high = row["accuracy_low"], row["accuracy_high"]
    return 100 * (value if low is None else low), 100 * (value if high is None else high)


def _curve(
    axes: Any, label: str, positions: str, points: Sequence[Row], color: str, dodge: float
) -> None:
    own = [row for row in points if row["method"] != FULL]
    x = [row["kept_fraction"] * dodge for row in own]
    y = [100 * row["accuracy"] for row in own]
    # a rounding error of a bar's length must not make it negative
    below = [max(0.0, v - _interval(row)[0]) for v, row in zip(y, own, strict=True)]
    above = [max(0.0, _interval(row)[1] - v) for v, row in zip(y, own, strict=True)]
    keeps = positions == "keep"
    seeds = max(row["seeds"] for row in own)
    style: dict[str, Any] = {"color": color, "lw": 1.8, "ls": "-" if keeps else (0, (3, 1.5))}
    for full in (row for row in points if row["method"] == FULL):
        axes.plot([full["kept_fraction"], x[0]], [100 * full["accuracy"], y[0]], **style)
    axes.errorbar(
        x,
        y,
        yerr=(below, above),
        **style,
        elinewidth=0.9,
        capsize=2,
        marker=_MARKERS.get(label, "o"),
        ms=6,
        mfc=color if keeps else "white",
        label=f"{label}, {positions}" + (f" ({seeds} seeds)" if seeds > 1 else ""),
        zorder=3 if label not in _FIXED else 2,
    )


def _frame(axes: Any, task: str, rows: Sequence[Row]) -> None:
    from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

    kept = sorted({round(row["kept_fraction"], 3) for row in rows})
    axes.set_xscale("log")
    low = min(kept) / 1.12
    axes.set_xlim(low, 1.1)
    ticks = [t for t in (0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0) if t >= low]
    axes.xaxis.set_major_locator(FixedLocator(ticks))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{100 * x:g} %"))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda y, _: f"{y:g} %"))
    axes.set_xlabel("visual tokens kept (measured share, log scale)")
    axes.set_ylabel("accuracy, 95 % intervals")
    axes.set_title(f"{task}, {rows[0]['n']} questions", loc="left", fontsize=11)
    axes.grid(alpha=0.25, lw=0.6)
    axes.spines[["top", "right"]].set_visible(False)
