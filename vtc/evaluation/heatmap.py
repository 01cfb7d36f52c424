"""Accuracy by kind of question: a table for every keep, shaded by what was lost."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import pandas as pd

from vtc.evaluation.compression import FULL, RANDOM, build
from vtc.evaluation.printed import name, percent
from vtc.evaluation.rows import Row, kind_column

# a loss of so many points has the full shade
_DEEPEST = 0.5


@dataclass(frozen=True)
class Cell:
    """Accuracy on one kind: in percent, and how much was lost (or won) against the full model."""

    text: str
    shade: int
    won: bool


@dataclass(frozen=True)
class Line:
    """A method: its name, tokens kept and active as text, and a cell for each kind."""

    name: str
    kept: str
    active: str
    cells: list[Cell]


@dataclass(frozen=True)
class HeatMap:
    """All methods at one keep.

    Attributes:
        keep: as on the command line.
        kinds: names of the kinds, each with its number of questions.
        lines: the full model first.
    """

    keep: str
    kinds: list[tuple[str, int]]
    lines: list[Line]


def heat_maps(frame: pd.DataFrame, rows: Sequence[Row]) -> list[HeatMap]:
    """One table for every keep; none where the questions have no kinds.

    Methods that decide by themselves stand in all of them, methods that skip work where nearest to
    as many active tokens as `random` keeps.

    Args:
        frame: samples of one model and task.
        rows: of the same, seeds averaged.
    """
    counts = frame[frame["label"] == FULL]["kind"].dropna().value_counts()
    kinds = [(str(kind), int(counts[kind])) for kind in sorted(counts.index)]
    full = next((row for row in rows if row["label"] == FULL), None)
    if not kinds or full is None:
        return []
    shares = {row["keep"]: row["kept_fraction"] for row in rows if row["label"] == RANDOM}
    return [
        HeatMap(keep, kinds, [_line(row, full, kinds) for row in rows_at(rows, keep, share)])
        for keep, share in shares.items()
    ]


def rows_at(rows: Sequence[Row], keep: str, share: float) -> list[Row]:
    """Every method at one keep, under the first policy it was run under.

    Args:
        rows: of one model and task, seeds averaged.
        keep: the budget.
        share: of visual tokens that `random` keeps there; of methods that skip work in layers, the
            row with nearest to as many active tokens stands for it.
    """
    found = []
    for label in dict.fromkeys(row["label"] for row in rows):
        own = [row for row in rows if row["label"] == label]
        own = [row for row in own if row["positions"] == own[0]["positions"]]
        if build(own[0]["method"], own[0]["options"]).site == "llm_rows":
            found.append(min(own, key=lambda row: abs(row["active_fraction"] - share)))
            continue
        found += [r for r in own if r["label"] == FULL or r["keep"] in (keep, "adaptive")][:1]
    return found


def _line(row: Row, full: Row, kinds: Sequence[tuple[str, int]]) -> Line:
    keys = [kind_column(kind) for kind, _ in kinds]
    cells = [_cell(row.get(key), full.get(key)) for key in keys]
    return Line(
        name(row), percent(row["kept_fraction"], 1), percent(row["active_fraction"], 1), cells
    )


def _cell(value: float | None, reference: float | None) -> Cell:
    if value is None or reference is None or pd.isna(value):
        return Cell("", 0, False)
    gap = value - reference
    return Cell(f"{100 * value:.0f}", round(100 * min(1.0, abs(gap) / _DEEPEST)), gap > 0)
