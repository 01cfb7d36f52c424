"""Intervals against plain statements: Wilson's definition, and a bootstrap written out."""

import math

import numpy as np
import pytest
from scipy import stats

from vtc.evaluation.statistics import (
    RESAMPLES,
    SEED,
    accuracy_interval,
    difference_interval,
)

pytestmark = pytest.mark.eval


def bootstrap(a, b, seed):
    """Question by question: draw as many as there are, and take both answers of each."""
    random, gaps = np.random.default_rng(seed), []
    for _ in range(RESAMPLES):
        drawn = random.integers(len(a), size=len(a))
        gaps.append(a[drawn].mean() - b[drawn].mean())
    return np.percentile(gaps, [2.5, 97.5])


def answers(n, share, seed):
    return (np.random.default_rng(seed).random(n) < share).astype(float)


def test_the_difference_is_a_bootstrap_over_whole_questions():
    a, b = answers(217, 0.8, 1), answers(217, 0.6, 2)
    found = difference_interval(a, b)
    assert found.value == pytest.approx(a.mean() - b.mean())
    assert (found.low, found.high) == pytest.approx(bootstrap(a, b, SEED), abs=1e-12)


def test_other_seeds_and_scipy_agree_within_what_seeds_do():
    a, b = answers(217, 0.8, 1), answers(217, 0.6, 2)
    found = difference_interval(a, b)
    others = np.array([bootstrap(a, b, seed) for seed in range(1, 7)])
    # percentiles of a mean over n answers are whole n-ths: one of them is no difference
    spread = np.ptp(others, axis=0) + 1 / len(a)
    assert found.low == pytest.approx(others[:, 0].mean(), abs=spread[0])
    assert found.high == pytest.approx(others[:, 1].mean(), abs=spread[1])
    theirs = stats.bootstrap(
        (a, b),
        lambda x, y, axis: (x - y).mean(axis),
        paired=True,
        n_resamples=RESAMPLES,
        method="percentile",
        rng=np.random.default_rng(7),
    ).confidence_interval
    assert found.low == pytest.approx(theirs.low, abs=spread[0])
    assert found.high == pytest.approx(theirs.high, abs=spread[1])


def test_questions_that_are_hard_for_both_do_not_widen_the_difference():
    hard = answers(100, 0.5, 0) * 0.5
    found = difference_interval(hard + 0.25, hard)
    assert (found.low, found.high) == pytest.approx((0.25, 0.25))
    shuffled = difference_interval(hard + 0.25, np.roll(hard, 1))
    assert shuffled.high - shuffled.low > 0.05


def test_exchanging_both_changes_the_sign():
    a, b = answers(63, 0.8, 1), answers(63, 0.6, 2)
    one, other = difference_interval(a, b), difference_interval(b, a)
    assert one == pytest.approx((-other.value, -other.high, -other.low))


@pytest.mark.parametrize(("right", "n"), [(0, 63), (1, 63), (31, 63), (200, 200), (1, 1)])
def test_right_or_wrong_answers_get_the_interval_of_wilson(right, n):
    found = accuracy_interval(np.repeat([1.0, 0.0], [right, n - right]))
    theirs = stats.binomtest(right, n).proportion_ci(0.95, method="wilson")
    assert found == pytest.approx((right / n, theirs.low, theirs.high), abs=1e-12)
    # what the interval is: the shares from which this one is no farther than 1.96 deviations
    for end in (found.low, found.high):
        if 0 < end < 1:
            distance = abs(right / n - end) / math.sqrt(end * (1 - end) / n)
            assert distance == pytest.approx(stats.norm.ppf(0.975))


def test_perfect_answers_are_not_certain():
    found = accuracy_interval(np.ones(200))
    assert found.high == 1.0 and 0.97 < found.low < 0.99


def test_means_over_seeds_get_a_bootstrap():
    scores = answers(217, 0.7, 3) / 3 + answers(217, 0.7, 4) * 2 / 3
    found = accuracy_interval(scores)
    zero = np.zeros_like(scores)
    assert (found.low, found.high) == pytest.approx(bootstrap(scores, zero, SEED), abs=1e-12)


def test_one_question_has_no_difference_interval():
    found = difference_interval(np.ones(1), np.zeros(1))
    assert found.value == 1.0 and math.isnan(found.low) and math.isnan(found.high)
    assert not found.excludes_zero


def test_zero_is_excluded_on_either_side():
    better, worse = np.ones(20), answers(20, 0.5, 0)
    assert difference_interval(better, worse).excludes_zero
    assert difference_interval(worse, better).excludes_zero
    assert not difference_interval(better, better).excludes_zero
