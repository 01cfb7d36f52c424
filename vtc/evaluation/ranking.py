"""One number per method: the area under accuracy against the share of tokens kept.

area = ∫ accuracy(x) dx / (accuracy of the full model · range of x),  x = log2(share kept)

from the smallest budget to everything, by the trapezoidal rule between the measured shares, with
the full model as the right end; a method that were as good as the full model at every budget has
100 %. The axis is that of the figures: every halving of the tokens weighs the same. On a linear
axis the step from all tokens to half of them, where methods hardly differ, would be half of the
number. All curves of a model and task end on the left where `random` does, whose share is exact: a
method that keeps fewer than its budget is interpolated there.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd
from scipy import integrate

from vtc.evaluation.compression import FULL, RANDOM
from vtc.evaluation.rows import Row, interval_columns
from vtc.evaluation.scores import DOWNSAMPLE, Scores
from vtc.evaluation.statistics import Floats, holm, ratio_interval, sign_flip
from vtc.evaluation.table import CurveKey, curves, drops_tokens

# shares of other counts than those of `random` may be off by the rounding of one token
_SLACK = 1.02
_NAMES = ("model", "task", "method", "options", "label", "positions", "seeds", "n")


def ranking(frame: pd.DataFrame, summary: Sequence[Row]) -> list[Row]:
    """One row per curve, the largest area of each model and task first.

    Methods without budgets, and those that keep every token, have no such curve. Scores are
    averaged over seeds question by question, so an area is a mean over questions: `area_low` and
    `area_high` are its paired bootstrap. `vs_random` and `vs_downsample` are differences of areas
    with intervals, against the curve under the same positions if it was run under them; their
    p-values are of `statistics.sign_flip` on the questions' areas, and in `..._holm` corrected for
    all methods that are ranked with this one: the best of many needs it most.

    Args:
        frame: from `table.samples_frame`.
        summary: rows with seeds averaged.

    Returns:
        Rows with `rank` (from 1 in each model and task), `budgets` (how many were measured) and
        `left` (the share where the area begins).
    """
    scores = Scores(frame)
    found: dict[tuple[str, str], dict[CurveKey, Row]] = {}
    areas: dict[CurveKey, Floats] = {}
    every = curves(summary)
    for curve, rows in every.items():
        left = _left(every, curve)
        if left is None or not _has_budgets(rows) or rows[-1]["kept_fraction"] > left * _SLACK:
            continue
        areas[curve] = _area(scores, rows, left)
        own = [row for row in rows if row["method"] != FULL]
        row: Row = {name: own[0][name] for name in _NAMES}
        row |= {"budgets": len(own), "left": left}
        full = scores.mean(rows[0])
        row |= interval_columns("area", ratio_interval(areas[curve], full))
        found.setdefault((curve.model, curve.task), {})[curve] = row
    for together in found.values():
        _compare(scores, summary, together, areas)
    return [row for together in found.values() for row in _ranked(list(together.values()))]


def _left(every: Mapping[CurveKey, list[Row]], of: CurveKey) -> float | None:
    """The smallest share that `random` kept, where the areas of a model and task begin."""
    shares = [
        rows[-1]["kept_fraction"]
        for curve, rows in every.items()
        if (curve.model, curve.task, curve.label) == (of.model, of.task, RANDOM)
    ]
    return min(shares) if shares and 0 < min(shares) < 1 else None


def _has_budgets(rows: Sequence[Row]) -> bool:
    """Whether the full model is there, and behind it budgets in tokens."""
    budgets = all(row["keep"] != "adaptive" for row in rows if row["method"] != FULL)
    return rows[0]["method"] == FULL and budgets and drops_tokens(rows)


def _area(scores: Scores, rows: Sequence[Row], left: float) -> Floats:
    """The area of each question, `[questions]`: its mean score over the axis.

    Args:
        scores: of all cells.
        rows: of a curve, the full model first, the largest share first behind it.
        left: where the area begins.
    """
    ascending = rows[::-1]
    x = np.log2([row["kept_fraction"] for row in ascending])
    y = np.stack([scores.mean(row) for row in ascending])  # [points, questions]
    start = np.log2(left)
    first = [np.interp(start, x, question) for question in y.T]
    inside = x > start
    over = np.concatenate([[start], x[inside]])
    area: Floats = integrate.trapezoid(np.vstack([first, y[inside]]), over, axis=0) / -start
    return area


def _compare(
    scores: Scores,
    summary: Sequence[Row],
    together: Mapping[CurveKey, Row],
    areas: Mapping[CurveKey, Floats],
) -> None:
    """Against the areas of random tokens and of smaller pictures."""
    for name in (RANDOM, DOWNSAMPLE):
        for curve, row in together.items():
            other = _rival(together, curve, name)
            full = scores.full(row)
            if other is None or full is None:
                row |= {**interval_columns(f"vs_{name}", None), f"p_{name}": None}
                continue
            gaps = areas[curve] - areas[other]
            row |= interval_columns(f"vs_{name}", ratio_interval(gaps, scores.mean(full)))
            row[f"p_{name}"] = sign_flip(gaps)
        values = holm(row[f"p_{name}"] for row in together.values())
        for row, value in zip(together.values(), values, strict=True):
            row[f"p_{name}_holm"] = value


def _rival(together: Mapping[CurveKey, Any], curve: CurveKey, method: str) -> CurveKey | None:
    """The curve of a baseline; under the same positions if it was run under them."""
    found = [c for c in together if c.label == method]
    if curve in found:
        return None
    same = [c for c in found if c.positions == curve.positions]
    return next(iter((*same, *found)), None)


def _ranked(rows: list[Row]) -> list[Row]:
    ordered = sorted(rows, key=lambda row: -(row["area"] or 0.0))
    return [{"rank": rank, **row} for rank, row in enumerate(ordered, 1)]
