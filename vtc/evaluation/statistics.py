"""Intervals and tests over questions, from scipy and statsmodels, always from the same stated seed.

Intervals are 95 %, percentiles of a bootstrap that draws whole questions, so that what two methods
said to the same question stays together.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Sequence
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy import stats

Floats = NDArray[np.float64]
SEED = 0
RESAMPLES = 5000
FLIPS = 9999
CONFIDENCE = 0.95
# of soft scores (VQA's, F1), what counts as a right answer where right and wrong are counted
RIGHT = 0.5


class Interval(NamedTuple):
    """An estimate and its 95 % interval; NaN for both ends where there is none."""

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


def ratio_interval(a: Floats, b: Floats) -> Interval:
    """mean(a) / mean(b) of the same questions, paired in the same way.

    NaN where mean(b) is 0, and without ends where it is in some resample.
    """
    if not b.any():
        return Interval(*[float("nan")] * 3)
    return Interval(float(_ratio(a, b, 0)), *_bootstrap(a, b, statistic=_ratio))


def mcnemar(own: Sequence[Floats], other: Sequence[Floats]) -> float:
    """The p-value that two methods are right on the same questions equally often, two-sided.

    McNemar's exact test (statsmodels) over the questions of which one is right and the other is
    wrong. A score of at least `RIGHT` is right.

    A method with several seeds is several sets of answers, each of them tested by itself. Neither
    a majority of the seeds nor their mean is an answer that the method gave: a vote of three draws
    is right more often than a draw. The p-values are of the same questions, so they depend on each
    other and may not be multiplied or averaged as if they did not. Twice their median, at most 1,
    is a valid p-value whatever the dependence (Meinshausen, Meier and Bühlmann 2009, with quantile
    1/2): half of the seeds must show the difference, each at half of the level.

    Args:
        own: scores of one method, one array per seed, each `[questions]`, in the same order.
        other: those of the other.
    """
    right = [[scores >= RIGHT for scores in method] for method in (own, other)]
    values = [_exact(int((a & ~b).sum()), int((b & ~a).sum())) for a in right[0] for b in right[1]]
    return values[0] if len(values) == 1 else min(1.0, 2 * float(np.median(values)))


def sign_flip(gaps: Floats) -> float:
    """The p-value that the mean of paired differences is 0, two-sided, for scores of any kind.

    A permutation test (scipy) that exchanges the two methods question by question; of right and
    wrong answers it is McNemar's. One question can show nothing: exchanged, it is as far from 0.

    Args:
        gaps: a − b, `[questions]`.
    """
    if len(gaps) < 2 or not gaps.any():
        return 1.0
    found = stats.permutation_test(
        (gaps,),
        np.mean,
        permutation_type="samples",
        vectorized=True,
        n_resamples=FLIPS,
        batch=max(1, 2**17 // len(gaps)),
        rng=np.random.default_rng(SEED),
    )
    return float(found.pvalue)


def holm(values: Iterable[float | None]) -> list[float | None]:
    """p-values corrected for being one of several, by Holm's step-down (statsmodels).

    What was not tested (None) is no hypothesis and stays None.
    """
    from statsmodels.stats.multitest import multipletests

    given = list(values)
    tested = [i for i, value in enumerate(given) if value is not None]
    found: list[float | None] = [None] * len(given)
    if tested:
        corrected = multipletests([given[i] for i in tested], method="holm")[1]
        for i, value in zip(tested, corrected, strict=True):
            found[i] = float(value)
    return found


@lru_cache(maxsize=4096)
def _exact(only_first: int, only_second: int) -> float:
    from statsmodels.stats.contingency_tables import mcnemar as test

    return float(test([[0, only_first], [only_second, 0]], exact=True).pvalue)


def _ratio(a: Floats, b: Floats, axis: int) -> Any:
    # a resample without a single right answer has no ratio
    with np.errstate(divide="ignore", invalid="ignore"):
        return a.mean(axis=axis) / b.mean(axis=axis)


def _bootstrap(*values: Floats, statistic: Any = np.mean) -> tuple[float, float]:
    """Percentiles of a statistic of as many questions, drawn with replacement."""
    if len(values[0]) < 2:
        return float("nan"), float("nan")
    return _ends(tuple(np.asarray(v, np.float64).tobytes() for v in values), statistic)


# a method with one seed has the same row twice: by itself, and with its seeds averaged
@lru_cache(maxsize=4096)
def _ends(content: tuple[bytes, ...], statistic: Any) -> tuple[float, float]:
    values = [np.frombuffer(one, np.float64) for one in content]
    with np.errstate(invalid="ignore"), warnings.catch_warnings():
        # ends that are no numbers are said to be none, below
        warnings.simplefilter("ignore", stats.DegenerateDataWarning)
        found = stats.bootstrap(
            values,
            statistic,
            paired=len(values) > 1,
            vectorized=True,
            n_resamples=RESAMPLES,
            # what is drawn at once stays in the processor's cache
            batch=max(1, 2**17 // len(values[0])),
            confidence_level=CONFIDENCE,
            method="percentile",
            rng=np.random.default_rng(SEED),
        ).confidence_interval
    low, high = float(found.low), float(found.high)
    return (low, high) if np.isfinite([low, high]).all() else (float("nan"), float("nan"))
