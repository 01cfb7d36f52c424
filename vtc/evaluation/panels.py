"""One panel of a figure: the curves of some methods over one axis, with all others faint behind."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from vtc.evaluation.cells import BASELINES
from vtc.evaluation.compression import FULL, RANDOM
from vtc.evaluation.groups import Curve, group
from vtc.evaluation.pareto import front, share_of_time
from vtc.evaluation.printed import short
from vtc.evaluation.rows import Row

# Okabe and Ito's palette: told apart with any color vision, and by brightness on gray paper
_COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#332288", "#000000")
# a color that comes again has another marker
_SHAPES = ("o", "P", "X", "<")
# baselines stay in the background, and apart from all of these
_FIXED = {
    "random": ("#777777", "s"),
    "uniform": ("#A6A6A6", "^"),
    "average_pool": ("#8C6D46", "D"),
    "downsample": ("#E69F00", "v"),
}
_FAINT = "#DCDCDC"
# points of one budget would hide each other's intervals: each curve is moved by this much
_DODGE = 0.012
_TICKS = (0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0)

Look = tuple[str, str]


@dataclass(frozen=True)
class Axis:
    """What accuracy is drawn against.

    Attributes:
        name: the number of a row.
        title: the axis label.
        logarithmic: whether it is a share of tokens on a log scale; else one of time.
        policy: the only position policy shown; None: all.
    """

    name: str
    title: str
    logarithmic: bool = True
    policy: str | None = None


@dataclass(frozen=True)
class Panel:
    """What is drawn together.

    Attributes:
        model: whose answers.
        task: to which questions.
        title: what its methods have in common; empty: nothing has to be said.
        rows: all of the model and task, seeds averaged.
        curves: drawn in color.
        behind: drawn faint.
        chance: accuracy by guessing, where known.
        looks: color and marker of every method.
    """

    model: str
    task: str
    title: str
    rows: Sequence[Row]
    curves: Sequence[Curve]
    behind: Sequence[Curve]
    chance: float | None
    looks: Mapping[str, Look] = field(repr=False)

    @property
    def heading(self) -> str:
        """Task, questions and what the methods have in common."""
        words = f"{self.task}, {self.rows[0]['n']} questions"
        return f"{words}: {self.title}" if self.title else words


def looks(summary: Sequence[Row]) -> dict[str, Look]:
    """Color and marker of every method: the same in all figures, distinct within a panel."""
    found: dict[str, Look] = {}
    counts: dict[str, int] = {}
    for row in summary:
        label = row["label"]
        if row["method"] == FULL or label in found:
            continue
        if label in BASELINES:
            found[label] = _FIXED[label]
            continue
        place = group(row)
        i = counts[place] = counts.get(place, -1) + 1
        found[label] = _COLORS[i % len(_COLORS)], _SHAPES[i // len(_COLORS) % len(_SHAPES)]
    return found


def draw(axes: Any, panel: Panel, axis: Axis, width: float) -> None:
    """Draw a panel, its title, labels and legend.

    Args:
        axes: of matplotlib, empty.
        panel: what to draw.
        axis: against what.
        width: of the panel in inches, for line breaks.
    """
    _behind(axes, panel, axis)
    for i, (key, points) in enumerate(panel.curves):
        dodge = i - (len(panel.curves) - 1) / 2
        _curve(axes, (key.label, key.positions), points, (panel.looks[key.label], dodge), axis)
    for full in (row for row in panel.rows if row["method"] == FULL):
        _full(axes, full, axis)
    if not axis.logarithmic:
        _front(axes, panel, axis)
    if panel.chance is not None:
        axes.axhline(100 * panel.chance, color="black", lw=1, ls=":", label="guessing")
    _frame(axes, panel, axis, width)
    _legend(axes, width)


def limits(axes: Any, panels: Sequence[Panel], axis: Axis) -> None:
    """Give a panel the range of all panels that it is compared with."""
    from matplotlib.ticker import FixedLocator, FuncFormatter, MaxNLocator, NullLocator

    rows = [row for panel in panels for row in panel.rows]
    lows = [_interval(row)[0] for row in rows]
    lows += [100 * panel.chance for panel in panels if panel.chance is not None]
    bottom, top = min(lows), max(_interval(row)[1] for row in rows)
    pad = 0.04 * max(top - bottom, 1.0)
    axes.set_ylim(bottom - pad, top + pad)
    percents = FuncFormatter(lambda x, _: f"{100 * x:g} %")
    if not axis.logarithmic:
        axes.set_xlim(left=0)
        axes.xaxis.set_major_locator(MaxNLocator(6))
        axes.xaxis.set_major_formatter(percents)
        return
    # to three digits: shares of other counts may differ in their last one
    shares = [
        round(row[axis.name], 3) for panel in panels for _, own in panel.curves for row in own
    ]
    low = min(shares, default=1.0) / 1.12
    axes.set_xscale("log")
    axes.set_xlim(low, 1.1)
    axes.xaxis.set_major_locator(FixedLocator([tick for tick in _TICKS if tick >= low]))
    axes.xaxis.set_minor_locator(NullLocator())
    # setting the scale put another one in its place
    axes.xaxis.set_major_formatter(percents)


def _behind(axes: Any, panel: Panel, axis: Axis) -> None:
    """The curves of other panels; `random` is named, because it is what to compare with."""
    for key, points in panel.behind:
        own = [row for row in points if row["method"] != FULL]
        x, y = [row[axis.name] for row in own], [100 * row["accuracy"] for row in own]
        if key.label == RANDOM:
            axes.plot(x, y, color=_FIXED[RANDOM][0], lw=1.2, zorder=1.5, label=RANDOM)
        else:
            axes.plot(x, y, color=_FAINT, lw=1.1, marker="o", ms=2.5, zorder=1)


def _full(axes: Any, full: Row, axis: Axis) -> None:
    accuracy, (low, high) = 100 * full["accuracy"], _interval(full)
    axes.axhline(accuracy, color="black", lw=1, ls=(0, (6, 2)), label="full model")
    axes.axhspan(low, high, color="black", alpha=0.06, lw=0)
    if axis.logarithmic:
        axes.plot([full[axis.name]], [accuracy], "*", color="black", ms=12, zorder=2.5)
    else:
        axes.axvspan(full["ttft_ratio_p20"], full["ttft_ratio_p80"], color="black", alpha=0.06)
        axes.plot([1.0], [accuracy], "*", color="black", ms=12, zorder=2.5)


def _front(axes: Any, panel: Panel, axis: Axis) -> None:
    """The best of all methods, those of other panels too."""
    # the full model has all tokens where they are, under any policy
    best = front(
        [r for r in panel.rows if r["method"] == FULL or axis.policy in (None, r["positions"])]
    )
    x, y = [share_of_time(row) for row in best], [100 * row["accuracy"] for row in best]
    style = {"color": "black", "lw": 1.3, "alpha": 0.75, "zorder": 3.5}
    axes.plot(x, y, drawstyle="steps-post", label="Pareto front", **style)


def _interval(row: Row) -> tuple[float, float]:
    """In percent; without width where there was one question."""
    value = row["accuracy"]
    low, high = row["accuracy_low"], row["accuracy_high"]
    return 100 * (value if low is None else low), 100 * (value if high is None else high)


def _curve(
    axes: Any, name: Look, points: Sequence[Row], look: tuple[Look, float], axis: Axis
) -> None:
    """One method: `name` is its label and policy, `look` its looks and by how much it is moved."""
    (label, positions), ((color, marker), dodge) = name, look
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
        marker=marker,
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


def _frame(axes: Any, panel: Panel, axis: Axis, width: float) -> None:
    from matplotlib.ticker import FuncFormatter

    # about so many letters of 10 points fit into an inch; a title begins where the axes do
    letters = round(11.5 * width)
    lines = [textwrap.fill(line, letters) for line in axis.title.splitlines()]
    axes.yaxis.set_major_formatter(FuncFormatter(lambda y, _: f"{y:g} %"))
    axes.set_xlabel("\n".join(lines))
    axes.set_ylabel("accuracy, 95 % intervals")
    axes.set_title(textwrap.fill(panel.heading, letters - 10), loc="left", fontsize=10.5)
    axes.grid(alpha=0.25, lw=0.6)
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(labelbottom=True, labelleft=True)


def _legend(axes: Any, width: float) -> None:
    """Below the axes: inside, some curve or line always runs through it."""
    from matplotlib.transforms import ScaledTranslation

    longest = max(map(len, axes.get_legend_handles_labels()[1]))
    lines = axes.xaxis.get_label().get_text().count("\n") + 1
    # numbers at the ticks and the lines of the label, in points of 1/72 inch
    below = ScaledTranslation(0, -(22 + 13 * lines) / 72, axes.figure.dpi_scale_trans)
    axes.legend(
        fontsize=9,
        frameon=False,
        ncols=max(1, min(3, int(width * 13 / (longest + 6)))),
        loc="upper center",
        bbox_to_anchor=(0.5, 0),
        bbox_transform=axes.transAxes + below,
    )
