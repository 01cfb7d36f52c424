"""Intervals: 95 %, percentile bootstrap over questions, always from the same stated seed."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy import stats

Floats = NDArray[np.float64]
SEED = 0
RESAMPLES = 5000
CONFIDENCE = 0.95


class Interval(NamedTuple):
    """An estimate and its 95 % interval; NaN for both ends where one question has none."""

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
    return Interval(value, *_bootstrap(scores))


def difference_interval(a: Floats, b: Floats) -> Interval:
    """mean(a) − mean(b) of the same questions: whole questions are resampled, so it is paired."""
    gaps = a - b
    return Interval(float(gaps.mean()), *_bootstrap(gaps))


def _bootstrap(values: Floats) -> tuple[float, float]:
    """Percentiles of the mean of as many values, drawn with replacement."""
    if len(values) < 2:
        return float("nan"), float("nan")
    found = stats.bootstrap(
        (values,),
        np.mean,
        vectorized=True,
        n_resamples=RESAMPLES,
        # what is drawn at once stays in the processor's cache
        batch=max(1, 2**17 // len(values)),
        confidence_level=CONFIDENCE,
        method="percentile",
        rng=np.random.default_rng(SEED),
    ).confidence_interval
    return float(found.low), float(found.high)
