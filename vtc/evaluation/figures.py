"""Accuracy against tokens kept, active tokens and time to the first token, as PNG and SVG.

A few curves share one panel. More are told apart by where their methods act, a panel each, with all
others faint behind them.
"""

from __future__ import annotations

import io
import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from vtc.evaluation.compression import FULL, RANDOM
from vtc.evaluation.groups import grouped
from vtc.evaluation.printed import short
from vtc.evaluation.table import CurveKey, Row, curves, drops_tokens

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
_FAINT = "#DCDCDC"
# points of one budget would hide each other's intervals: each curve is moved by this much
_DODGE = 0.012

Curve = tuple[tuple[str, str, str], list[Row]]
Plot = dict[str, bytes]


@dataclass(frozen=True)
class _Axis:
    """What accuracy is drawn against.

    Attributes:
        name: the number of a row.
        title: the axis label.
        logarithmic: whether it is a share of tokens on a log scale.
        policy: the only position policy shown; None: all.
    """

    name: str
    title: str
    logarithmic: bool = True
    policy: str | None = None


def accuracy_plot(summary: Sequence[Row], chance: Mapping[str, float]) -> Plot:
    """Accuracy against tokens kept; methods that keep all of them at every budget are left out.

    Args:
        summary: rows with seeds averaged.
        chance: accuracy by guessing of each task, where known.

    Returns:
        The files' contents by ending: `png` and `svg`.
    """
    axis = _Axis("kept_fraction", "visual tokens kept (measured share, log scale)")
    found = curves(summary, axis.name)
    return _plot(summary, {k: v for k, v in found.items() if drops_tokens(v)}, chance, axis)


def active_plot(summary: Sequence[Row], chance: Mapping[str, float]) -> Plot:
    """Accuracy against active visual tokens, averaged over decoder layers, under one policy.

    Of a method that drops tokens, all that are there are active; of one that skips work, those in
    layers where visual rows go through both attention and the feed-forward network.

    Args:
        summary: rows with seeds averaged.
        chance: accuracy by guessing of each task, where known.

    Returns:
        The files' contents by ending.
    """
    policy = _first_policy(summary)
    title = "active visual tokens, averaged over decoder layers (measured share, log scale)"
    axis = _Axis("active_fraction", title, policy=policy)
    return _plot(summary, _under(policy, curves(summary, axis.name)), chance, axis)


def time_plot(
    summary: Sequence[Row], chance: Mapping[str, float], machine: str = ""
) -> Plot | None:
    """Accuracy against the measured time to the first token, under one policy.

    Args:
        summary: rows with seeds averaged.
        chance: accuracy by guessing of each task, where known.
        machine: what ran the model, for the axis.

    Returns:
        The files' contents by ending, or None where nothing was timed.
    """
    timed = [row for row in summary if row["ttft_ratio"] is not None]
    full = next((row for row in timed if row["method"] == FULL), None)
    if full is None:
        return None
    policy, where = _first_policy(summary), f" on {machine}" if machine else ""
    title = (
        f"time to first token: share of the full model's ({full['ttft_ms']:.0f} ms{where}),\n"
        f"median of {full['n_timed']} timed, bars: 20th to 80th percentile"
    )
    axis = _Axis("ttft_ratio", title, logarithmic=False, policy=policy)
    return _plot(timed, _under(policy, curves(timed, "active_fraction")), chance, axis)


def _first_policy(summary: Sequence[Row]) -> str | None:
    """The policy that every method was run under."""
    return next((row["positions"] for row in summary if row["method"] != FULL), None)


def _under(
    policy: str | None, found: Mapping[CurveKey, list[Row]]
) -> dict[CurveKey, list[Row]]:
    return {key: rows for key, rows in found.items() if key.positions == policy}


def _plot(
    summary: Sequence[Row],
    found: Mapping[CurveKey, list[Row]],
    chance: Mapping[str, float],
    axis: _Axis,
) -> Plot:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    tasks = list(dict.fromkeys(row["task"] for row in summary))
    panels = [
        (task, title, own)
        for task in tasks
        for title, own in grouped([(key, rows) for key, rows in found.items() if key.task == task])
    ]
    columns = 1 if len(panels) == len(tasks) else 2
    lines = -(-len(panels) // columns)
    width, height = (8.0, 5.8) if columns == 1 else (13.0, 5.6)
    # a figure of its own, not pyplot's: nothing global changes in the caller's process
    figure = Figure(figsize=(width, height * lines), layout="constrained")
    FigureCanvasAgg(figure)
    grid = figure.subplots(lines, columns, squeeze=False, sharex=columns > 1, sharey=columns > 1)
    flat = list(grid.flat)
    for spare in flat[len(panels) :]:
        spare.remove()
    for axes, (task, title, own) in zip(flat, panels, strict=False):
        rows = [row for row in summary if row["task"] == task]
        others = [(key, v) for key, v in found.items() if key.task == task and (key, v) not in own]
        if columns > 1:
            policy = axis.policy or _first_policy(summary)
            _behind(axes, [(key, v) for key, v in others if key.positions == policy], axis)
        _panel(axes, rows, own, chance.get(task), axis)
        _limits(axes, found.values(), axis)
        _frame(axes, f"{task}, {rows[0]['n']} questions" + (f": {title}" if title else ""), axis)
    return {ending: _file(figure, ending) for ending in ("png", "svg")}


def _file(figure: Any, ending: str) -> bytes:
    import matplotlib

    buffer = io.BytesIO()
    # no date and a fixed salt: the same table gives the same file
    metadata = {"Software": None} if ending == "png" else {"Date": None, "Creator": None}
    with matplotlib.rc_context({"svg.hashsalt": "vtc"}):
        figure.savefig(buffer, format=ending, dpi=160, metadata=metadata)
    return buffer.getvalue()


def _behind(axes: Any, others: Sequence[Curve], axis: _Axis) -> None:
    """The curves of other panels; `random` is named, because it is what to compare with."""
    named = False
    for (_, _, label, _), points in others:
        own = [row for row in points if row["method"] != FULL]
        x, y = [row[axis.name] for row in own], [100 * row["accuracy"] for row in own]
        if label == RANDOM and not named:
            axes.plot(x, y, color=_FIXED[RANDOM], lw=1.2, zorder=1.5, label=RANDOM)
            named = True
        else:
            axes.plot(x, y, color=_FAINT, lw=1.1, marker="o", ms=2.5, zorder=1)


def _panel(
    axes: Any, rows: Sequence[Row], found: Sequence[Curve], chance: float | None, axis: _Axis
) -> None:
    labels = list(dict.fromkeys(curve.label for curve, _ in found))
    others = itertools.cycle(_COLORS)
    colors = {label: _FIXED.get(label) or next(others) for label in labels}
    for i, ((_, _, label, positions), points) in enumerate(found):
        dodge = i - (len(found) - 1) / 2
        _curve(axes, (label, positions), points, (colors[label], dodge), axis)
    for full in (row for row in rows if row["method"] == FULL):
        accuracy, (low, high) = 100 * full["accuracy"], _interval(full)
        axes.axhline(accuracy, color="black", lw=1, ls=(0, (6, 2)), label="full model")
        axes.axhspan(low, high, color="black", alpha=0.06, lw=0)
        if axis.logarithmic:
            axes.plot([full[axis.name]], [accuracy], "*", color="black", ms=12, zorder=2.5)
        else:
            axes.axvspan(full["ttft_ratio_p20"], full["ttft_ratio_p80"], color="black", alpha=0.06)
            axes.plot([1.0], [accuracy], "*", color="black", ms=12, zorder=2.5)
    if chance is not None:
        axes.axhline(100 * chance, color="black", lw=1, ls=":", label="guessing")
    # below the axes: inside, some curve or line always runs through it
    labels = axes.get_legend_handles_labels()[1]
    axes.legend(
        fontsize=9,
        frameon=False,
        ncols=3 if max(map(len, labels)) <= 30 else 2,
        loc="upper center",
        bbox_to_anchor=(0.5, -0.13 if axis.logarithmic else -0.17),
    )


def _interval(row: Row) -> tuple[float, float]:
    """In percent; without width where there was one question."""
    value = row["accuracy"]
    low, high = row["accuracy_low"], row["accuracy_high"]
    return 100 * (value if low is None else low), 100 * (value if high is None else high)


def _curve(
    axes: Any,
    name: tuple[str, str],
    points: Sequence[Row],
    look: tuple[str, float],
    axis: _Axis,
) -> None:
    """One method: `name` is its label and policy, `look` its color and by how much it is moved."""
    (label, positions), (color, dodge) = name, look
    own = [row for row in points if row["method"] != FULL]
    # points without a curve are more likely to be in the same place
    step = _DODGE * (2 if len(own) == 1 else 1)
    moved = (1 + step * dodge) if axis.logarithmic else 1.0
    x = [row[axis.name] * moved for row in own]
    y = [100 * row["accuracy"] for row in own]
    # a rounding error of a bar's length must not make it negative
    below = [max(0.0, v - _interval(row)[0]) for v, row in zip(y, own, strict=True)]
    above = [max(0.0, _interval(row)[1] - v) for v, row in zip(y, own, strict=True)]
    keeps = positions == "keep"
    seeds = max(row["seeds"] for row in own)
    style: dict[str, Any] = {"color": color, "lw": 1.8, "ls": "-" if keeps else (0, (3, 1.5))}
    # one budget alone, or a time, has no step from the full model to it
    for full in (row for row in points if row["method"] == FULL):
        if axis.logarithmic and len(own) > 1:
            axes.plot([full[axis.name], x[0]], [100 * full["accuracy"], y[0]], **style)
    named = short(label) if axis.policy else f"{short(label)}, {positions}"
    axes.errorbar(
        x,
        y,
        yerr=(below, above),
        xerr=None if axis.logarithmic else _spread(own),
        **style,
        elinewidth=0.9,
        capsize=2,
        marker=_MARKERS.get(label, "o"),
        ms=6,
        mfc=color if keeps else "white",
        label=named + (f" ({seeds} seeds)" if seeds > 1 else ""),
        zorder=3 if label not in _FIXED else 2,
    )


def _spread(rows: Sequence[Row]) -> tuple[list[float], list[float]]:
    """How far the middle 60 % of times reach below and above their medians."""
    below = [max(0.0, row["ttft_ratio"] - row["ttft_ratio_p20"]) for row in rows]
    above = [max(0.0, row["ttft_ratio_p80"] - row["ttft_ratio"]) for row in rows]
    return below, above


def _limits(axes: Any, found: Any, axis: _Axis) -> None:
    from matplotlib.ticker import FixedLocator, NullLocator

    if not axis.logarithmic:
        axes.set_xlim(left=0)
        return
    shares = [round(row[axis.name], 3) for rows in found for row in rows]
    axes.set_xscale("log")
    low = min(shares, default=1.0) / 1.12
    axes.set_xlim(low, 1.1)
    ticks = [t for t in (0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0) if t >= low]
    axes.xaxis.set_major_locator(FixedLocator(ticks))
    axes.xaxis.set_minor_locator(NullLocator())


def _frame(axes: Any, title: str, axis: _Axis) -> None:
    from matplotlib.ticker import FuncFormatter

    axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{100 * x:g} %"))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda y, _: f"{y:g} %"))
    axes.set_xlabel(axis.title)
    axes.set_ylabel("accuracy, 95 % intervals")
    axes.set_title(title, loc="left", fontsize=11)
    axes.grid(alpha=0.25, lw=0.6)
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(labelbottom=True, labelleft=True)
