"""What a report shows of one model and one task, ready for the template."""

from __future__ import annotations

import math
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import pandas as pd

from vtc.evaluation import findings, printed
from vtc.evaluation.cells import BASELINES
from vtc.evaluation.compression import FULL
from vtc.evaluation.figures import Chart
from vtc.evaluation.heatmap import HeatMap, heat_maps
from vtc.evaluation.orders import crossings, leaders
from vtc.evaluation.pareto import front, share_of_time
from vtc.evaluation.pictures import Broken, Example, Shown
from vtc.evaluation.rows import Row
from vtc.evaluation.summary import Verdict, at_a_glance, verdicts
from vtc.evaluation.svg import for_page

# columns of the table behind those that are printed: shares of images, in percent
SPREAD = ("kept min", "20 %", "median", "80 %", "max")


@dataclass(frozen=True)
class Drawn:
    """What was drawn with the model."""

    examples: Sequence[Example] = ()
    layers: Sequence[Shown] = ()
    failures: Sequence[Broken] = ()


@dataclass(frozen=True)
class Ranked:
    """A method in the ranking: its area and how it compares, as text and as places on a scale, and
    how to trace it."""

    name: str
    value: str
    said: str
    positions: str
    random: str
    downsample: str
    at: float
    low: float
    high: float
    simple: bool
    trace: str


@dataclass(frozen=True)
class Line:
    """A row of the table: its cells, whether a method starts there, and how to trace it."""

    cells: list[str]
    starts: bool
    strong: bool
    trace: str


@dataclass(frozen=True)
class View:
    """One model on one task."""

    model: str
    task: str
    parameters: str
    full: Row
    chance: float | None
    glance: str
    ranking: list[Ranked]
    verdicts: list[Verdict]
    losses: list[str]
    bends: list[str]
    turns: list[str]
    plots: dict[str, list[tuple[str, str]]]
    front: list[tuple[str, str, str, str]]
    heats: list[HeatMap]
    chosen: str
    table: list[Line]
    drawn: Drawn = field(repr=False)

    @property
    def title(self) -> str:
        """Model and task in words."""
        return f"{self.model} on {self.task}"


def view(
    frame: pd.DataFrame, rows: Sequence[Row], ranked: Sequence[Row], drawn: Drawn, **more: Any
) -> View:
    """Everything about one model and task.

    Args:
        frame: its samples.
        rows: its rows, seeds averaged, the full model among them.
        ranked: its methods by area under the curve, the best first.
        drawn: its pictures.
        more: `parameters` and `chance` of the view, and all `charts` by name.
    """
    full = next(row for row in rows if row["method"] == FULL)
    charts: Mapping[str, Chart] = more["charts"]
    heats = heat_maps(frame, rows)
    return View(
        model=full["model"],
        task=full["task"],
        parameters=more["parameters"],
        full=full,
        chance=more["chance"],
        glance=at_a_glance(rows),
        ranking=ranking(ranked),
        verdicts=verdicts(rows),
        losses=findings.losses(frame, rows),
        bends=findings.bends(frame, rows),
        turns=[*leaders(rows), *crossings(frame, rows)],
        plots={name: _plots(chart, full) for name, chart in charts.items()},
        front=[_on_front(row) for row in front(_first_policy(rows))],
        heats=heats,
        chosen=_nearest(rows, [heat.keep for heat in heats]),
        table=_lines(rows),
        drawn=drawn,
    )


def ranking(ranked: Sequence[Row]) -> list[Ranked]:
    """Areas on one scale, from a little below the lowest end to a little above the highest."""
    ranked = [row for row in ranked if row["area"] is not None]
    if not ranked:
        return []
    ends = [(row["area"], *_ends(row)) for row in ranked]
    low, high = min(map(min, ends)), max(map(max, ends))
    pad = 0.04 * ((high - low) or 1.0)
    scale = [[100 * (v - low + pad) / (high - low + 2 * pad) for v in values] for values in ends]
    return [
        Ranked(
            name=texts["method"],
            value=f"{100 * row['area']:.1f}",
            said=texts["area"],
            at=at,
            positions=texts["positions"],
            random=texts["vs random"],
            downsample=texts["vs downsample"],
            low=left,
            high=right,
            simple=row["label"] in BASELINES,
            trace=shlex.join([*_traced(row), "--area", "--positions", row["positions"]]),
        )
        for row, (at, left, right) in zip(ranked, scale, strict=True)
        for texts in (printed.area_by_column(row),)
    ]


def trace_command(row: Row) -> str:
    """The command that computes a row again from its samples, run in the folder of the page.

    A method that names a file by its folder goes by its name alone: where the file lies is nobody
    else's business.
    """
    words = _traced(row)
    if row["method"] != FULL:
        words += ["--keep", row["keep"], "--positions", row["positions"]]
    return shlex.join(words)


def _traced(row: Row) -> list[str]:
    named = row["label"] if printed.short(row["label"]) == row["label"] else row["method"]
    return ["vtc", "trace", ".", "--model", row["model"], "--task", row["task"], "--method", named]


def _ends(row: Row) -> tuple[float, float]:
    low, high = row["area_low"], row["area_high"]
    return (row["area"] if low is None else low), (row["area"] if high is None else high)


def _plots(chart: Chart, full: Row) -> list[tuple[str, str]]:
    """The panels of a chart that are of a row's model and task, with words for each."""
    own = [p for p in chart.panels if (p.model, p.task) == (full["model"], full["task"])]
    against = chart.axis.title.partition("(")[0].partition(":")[0].strip()
    return [
        (
            for_page(chart.alone(panel)),
            f"{panel.model}, {panel.heading}: accuracy against {against}",
        )
        for panel in own
    ]


def _first_policy(rows: Sequence[Row]) -> list[Row]:
    policy = next((row["positions"] for row in rows if row["method"] != FULL), None)
    return [row for row in rows if row["method"] == FULL or row["positions"] == policy]


def _on_front(row: Row) -> tuple[str, str, str, str]:
    keep = "" if row["method"] == FULL else row["keep"]
    accuracy = f"{100 * row['accuracy']:.1f} {printed.interval(row, 'accuracy', signed=False)}"
    return printed.name(row), keep, printed.percent(share_of_time(row), 0), accuracy


def _nearest(rows: Sequence[Row], keeps: Sequence[str]) -> str:
    """The keep of the pictures."""
    from vtc.evaluation.pictures import KEEP

    shares = {row["keep"]: row["kept_fraction"] for row in rows if row["keep"] in keeps}
    return min(keeps, key=lambda keep: abs(shares.get(keep, math.inf) - KEEP), default="")


def _lines(rows: Sequence[Row]) -> list[Line]:
    found = []
    for before, row in zip([None, *rows], rows, strict=False):
        cells = [*printed.cells(row), *_spread(row)]
        starts = before is None or before["label"] != row["label"]
        found.append(Line(cells, starts, row["method"] == FULL, trace_command(row)))
    return found


def _spread(row: Row) -> list[str]:
    """The realized shares of images, in the order of `SPREAD`."""
    values = [row[f"kept_{name}"] for name in ("min", "p20", "p50", "p80", "max")]
    return ["n/a" if value is None else f"{100 * value:.1f}" for value in values]
