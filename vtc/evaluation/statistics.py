"""Intervals: 95 %, percentile bootstrap over questions, always from the same stated seed."""

from __future__ import annotations

import math
from statistics import NormalDist
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
SEED = 0
RESAMPLES = 5000
CONFIDENCE = 0.95
# resamples drawn at once: 500 of 10,000 questions are 40 MB
_BLOCK = 500


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
        return Interval(value, *_wilson(value, len(scores)))
    return Interval(value, *_bootstrap(scores))


def difference_interval(a: Floats, b: Floats) -> Interval:
    """mean(a) − mean(b) of the same questions: whole questions are resampled, so it is paired."""
    gaps = a - b
    return Interval(float(gaps.mean()), *_bootstrap(gaps))


def _wilson(share: float, n: int) -> tuple[float, float]:
    """Wilson (1927): the shares p for which `share` lies within z standard deviations of p."""
    z = NormalDist().inv_cdf((1 + CONFIDENCE) / 2)
    middle = share + z**2 / (2 * n)
    half = z * math.sqrt(share * (1 - share) / n + z**2 / (4 * n**2))
    low, high = ((middle + sign * half) / (1 + z**2 / n) for sign in (-1, 1))
    # rounding errors must not leave the interval without its own estimate
    return max(0.0, min(low, share)), min(1.0, max(high, share))


def _bootstrap(values: Floats) -> tuple[float, float]:
    """Percentiles of the mean of as many values, drawn with replacement."""
    n = len(values)
    if n < 2:
        return math.nan, math.nan
    random = np.random.default_rng(SEED)
    blocks = range(RESAMPLES // _BLOCK)
    means = [values[random.integers(n, size=(_BLOCK, n))].mean(1) for _ in blocks]
    low, high = np.quantile(np.concatenate(means), ((1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2))
    return float(low), float(high)
