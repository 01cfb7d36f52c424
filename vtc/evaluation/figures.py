"""Accuracy against tokens kept, active tokens and time to the first token, as PNG and SVG.

A few curves share one panel. More are told apart by where their methods act, a panel each, with all
others faint behind them.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from vtc.evaluation.compression import FULL
from vtc.evaluation.groups import Curve, grouped
from vtc.evaluation.panels import Axis, Panel, draw, limits, looks
from vtc.evaluation.rows import Row
from vtc.evaluation.table import curves, drops_tokens

Plot = dict[str, bytes]
# a panel alone is as wide as a phone shows it without making its letters small
_ALONE = (4.4, 4.6)
_WIDE, _PAIR = (8.0, 5.8), (6.5, 5.6)


@dataclass(frozen=True)
class Chart:
    """A figure: the same panels on one sheet, or each by itself."""

    axis: Axis
    panels: Sequence[Panel]

    def sheet(self) -> Plot:
        """All panels on one sheet: the files' contents by ending, `png` and `svg`."""
        sheets = {(panel.model, panel.task) for panel in self.panels}
        columns = 1 if len(self.panels) == len(sheets) else 2
        size = _WIDE if columns == 1 else _PAIR
        figure, flat = _figure(size, len(self.panels), columns)
        several = len({panel.model for panel in self.panels}) > 1
        for axes, panel in zip(flat, self.panels, strict=True):
            self._draw(axes, panel, size[0])
            if several:
                axes.set_title(f"{panel.model}: {panel.heading}", loc="left", fontsize=10.5)
        # the places of all parts are worked out once for both files
        figure.draw_without_rendering()
        figure.set_layout_engine("none")
        return {ending: _file(figure, ending) for ending in ("png", "svg")}

    def alone(self, panel: Panel) -> bytes:
        """One of the panels as an SVG by itself, on the scale of all of its model and task."""
        width, height = _ALONE
        names = len(panel.curves) + 4
        figure, (axes,) = _figure((width, height + 0.09 * names), 1, 1)
        self._draw(axes, panel, width)
        # letters as text: half the size of outlines, and in the page's own font
        return _file(figure, "svg", "none")

    def _draw(self, axes: Any, panel: Panel, width: float) -> None:
        draw(axes, panel, self.axis, width)
        compared = [p for p in self.panels if (p.model, p.task) == (panel.model, panel.task)]
        limits(axes, compared, self.axis)


def accuracy_chart(summary: Sequence[Row], chance: Mapping[str, float]) -> Chart:
    """Accuracy against tokens kept; methods that keep all of them at every budget are left out.

    Args:
        summary: rows with seeds averaged, of any number of models and tasks.
        chance: accuracy by guessing of each task, where known.
    """
    axis = Axis("kept_fraction", "visual tokens kept (measured share, log scale)")
    return _chart(summary, chance, axis, lambda found: [c for c in found if drops_tokens(c[1])])


def active_chart(summary: Sequence[Row], chance: Mapping[str, float]) -> Chart:
    """Accuracy against active visual tokens, averaged over decoder layers, under one policy.

    Of a method that drops tokens, all that are there are active; of one that skips work, those in
    layers where visual rows go through both attention and the feed-forward network.

    Args:
        summary: rows with seeds averaged, of any number of models and tasks.
        chance: accuracy by guessing of each task, where known.
    """
    title = "active visual tokens, averaged over decoder layers (measured share, log scale)"
    axis = Axis("active_fraction", title, policy=first_policy(summary))
    return _chart(summary, chance, axis)


def time_chart(
    summary: Sequence[Row], chance: Mapping[str, float], machine: str = ""
) -> Chart | None:
    """Accuracy against the measured time to the first token, under one policy, with the front.

    Args:
        summary: rows with seeds averaged, of any number of models and tasks.
        chance: accuracy by guessing of each task, where known.
        machine: what ran the model, for the axis.

    Returns:
        The chart, or None where nothing was timed.
    """
    timed = [row for row in summary if row["ttft_ratio"] is not None]
    fulls = [row for row in timed if row["method"] == FULL]
    if not fulls:
        return None
    # the time of one model and task says nothing about the others
    took = [f"{fulls[0]['ttft_ms']:.0f} ms"] if len(fulls) == 1 else []
    where = " on ".join([*took, *([machine] if machine else [])])
    title = (
        f"time to first token, share of the full model's\n{where}{', ' if where else ''}"
        f"median of {fulls[0]['n_timed']} timed,\nbars: 20th to 80th percentile"
    )
    axis = Axis("ttft_ratio", title, logarithmic=False, policy=first_policy(summary))
    return _chart(timed, chance, axis)


def first_policy(summary: Sequence[Row]) -> str | None:
    """The policy that every method was run under."""
    return next((row["positions"] for row in summary if row["method"] != FULL), None)


def _chart(
    summary: Sequence[Row],
    chance: Mapping[str, float],
    axis: Axis,
    chosen: Callable[[list[Curve]], list[Curve]] = list,
) -> Chart:
    by = "kept_fraction" if axis.name == "kept_fraction" else "active_fraction"
    styles, panels = looks(summary), []
    for model, task in dict.fromkeys((row["model"], row["task"]) for row in summary):
        rows = [row for row in summary if (row["model"], row["task"]) == (model, task)]
        found = [
            (key, own)
            for key, own in chosen(list(curves(rows, by).items()))
            if axis.policy in (None, key.positions)
        ]
        policy = axis.policy or first_policy(rows)
        parts = grouped(found)
        for title, own in parts:
            others = [curve for curve in found if curve not in own and curve[0][-1] == policy]
            panels.append(Panel(model, task, title, rows, own, others, chance.get(task), styles))
    return Chart(axis, panels)


def _figure(size: tuple[float, float], panels: int, columns: int) -> tuple[Any, Iterable[Any]]:
    """A figure of its own, not pyplot's: nothing global changes in the caller's process."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    lines = -(-panels // columns)
    figure = Figure(figsize=(size[0] * columns, size[1] * lines), layout="constrained")
    FigureCanvasAgg(figure)
    flat = list(figure.subplots(lines, columns, squeeze=False).flat)
    for spare in flat[panels:]:
        spare.remove()
    return figure, flat[:panels]


def _file(figure: Any, ending: str, letters: str = "path") -> bytes:
    import matplotlib

    buffer = io.BytesIO()
    # no date and a fixed salt: the same table gives the same file
    metadata = {"Software": None} if ending == "png" else {"Date": None, "Creator": None}
    with matplotlib.rc_context({"svg.hashsalt": "vtc", "svg.fonttype": letters}):
        figure.savefig(buffer, format=ending, dpi=160, metadata=metadata)
    return buffer.getvalue()
