"""Intervals: 95 %, percentile bootstrap over questions, always from the same stated seed."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy import stats

Floats = NDArray[np.float64]
SEED = 0
RESAMPLES = 5000
CONFIDENCE = 0.95


class Interval(NamedTuple):
    """An estimate and its 95 % interval."""

    value: float
    low: float
    high: float

    @property
    def excludes_zero(self) -> bool:
        """Whether zero lies outside."""
        return self.low > 0 or self.high < 0


def accuracy_interval(scores: Floats) -> Interval:
    """The mean of scores in [0, 1], one per question.

    Wilson's interval where all are 0 or 1 (a bootstrap of 200 right answers would claim certainty),
    else a bootstrap.
    """
    value = float(scores.mean())
    if np.isin(scores, (0, 1)).all():
        right = int(scores.sum())
        found = stats.binomtest(right, len(scores)).proportion_ci(CONFIDENCE, method="wilson")
        return Interval(value, float(found.low), float(found.high))
    return Interval(value, *_bootstrap((scores,)))


def difference_interval(a: Floats, b: Floats) -> Interval:
    """mean(a) − mean(b) of the same questions: whole questions are resampled, so it is paired."""
    return Interval(float((a - b).mean()), *_bootstrap((a, b)))


def _bootstrap(data: tuple[Floats, ...]) -> tuple[float, float]:
    if len(data[0]) < 2:
        return float("nan"), float("nan")
    found = stats.bootstrap(
        data,
        _mean_difference,
        paired=True,
        vectorized=True,
        n_resamples=RESAMPLES,
        confidence_level=CONFIDENCE,
        method="percentile",
        rng=np.random.default_rng(SEED),
    ).confidence_interval
    return float(found.low), float(found.high)


def _mean_difference(*data: Floats, axis: int = -1) -> Any:
    first, *rest = data
    return (first - rest[0] if rest else first).mean(axis=axis)
