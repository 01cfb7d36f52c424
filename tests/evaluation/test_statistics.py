"""Intervals and tests against plain statements of what they are."""

import math

import numpy as np
import pytest
from scipy import stats

from vtc.evaluation.statistics import (
    RESAMPLES,
    SEED,
    accuracy_interval,
    difference_interval,
    holm,
    mcnemar,
    ratio_interval,
    sign_flip,
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


def test_a_ratio_is_a_bootstrap_over_whole_questions():
    a, b = answers(63, 0.6, 1), answers(63, 0.8, 2)
    random, ratios = np.random.default_rng(SEED), []
    for _ in range(RESAMPLES):
        drawn = random.integers(len(a), size=len(a))
        ratios.append(a[drawn].mean() / b[drawn].mean())
    found = ratio_interval(a, b)
    assert found.value == a.mean() / b.mean()
    assert (found.low, found.high) == pytest.approx(np.percentile(ratios, [2.5, 97.5]), abs=1e-12)
    assert ratio_interval(b, b) == (1.0, 1.0, 1.0)


def test_without_right_answers_there_is_no_ratio():
    assert all(map(math.isnan, ratio_interval(answers(9, 0.5, 0), np.zeros(9))))
    # a resample of three questions often misses the only right one
    found = ratio_interval(np.ones(3), np.array([0.0, 0.0, 1.0]))
    assert found.value == 3.0 and math.isnan(found.low) and math.isnan(found.high)


@pytest.mark.parametrize(("gained", "lost"), [(0, 0), (5, 0), (9, 2), (3, 3), (40, 17)])
def test_mcnemar_is_a_fair_coin_over_the_questions_that_one_alone_answers(gained, lost):
    both, neither = [1.0] * 31, [0.0] * 11
    own = np.array(both + neither + [1.0] * gained + [0.0] * lost)
    other = np.array(both + neither + [0.0] * gained + [1.0] * lost)
    coin = stats.binomtest(gained, gained + lost).pvalue if gained + lost else 1.0
    assert mcnemar([own], [other]) == pytest.approx(coin)
    assert mcnemar([other], [own]) == pytest.approx(coin)


def test_of_several_seeds_at_least_half_must_show_the_difference():
    own = np.ones(40)
    worse, same = answers(40, 0.5, 1), np.ones(40)
    single = mcnemar([own], [worse])
    assert single < 0.001
    assert mcnemar([own], [worse, worse, same]) == pytest.approx(2 * single)
    assert mcnemar([own], [worse, same, same]) == 1.0
    # on either side
    assert mcnemar([worse, worse, same], [own]) == pytest.approx(2 * single)


def test_soft_scores_are_right_from_one_half_on():
    own, other = np.array([0.5, 0.9, 0.3] * 20), np.array([0.4, 1.0, 0.0] * 20)
    assert mcnemar([own], [other]) == pytest.approx(stats.binomtest(20, 20).pvalue)


def test_exchanging_answers_of_right_and_wrong_ones_is_mcnemars_test():
    a, b = answers(120, 0.8, 1), answers(120, 0.65, 2)
    p = mcnemar([a], [b])
    # of 9,999 draws, within four of their standard deviations
    assert sign_flip(a - b) == pytest.approx(p, abs=4 * math.sqrt(p * (1 - p) / 9999) + 1e-4)
    assert sign_flip(b - a) == pytest.approx(sign_flip(a - b))
    assert sign_flip(np.zeros(9)) == 1.0


def test_one_question_shows_nothing():
    one, none = np.ones(1), np.zeros(1)
    assert sign_flip(one) == mcnemar([one], [none]) == 1.0


def test_holm_is_the_running_largest_of_each_times_how_many_are_left():
    values = [0.04, None, 0.001, 0.03, 0.6]
    order, largest, expected = [2, 3, 0, 4], 0.0, {}
    for left, i in zip((4, 3, 2, 1), order, strict=True):
        largest = max(largest, min(1.0, left * values[i]))
        expected[i] = largest
    found = holm(values)
    assert found[1] is None
    assert [found[i] for i in order] == pytest.approx([expected[i] for i in order])
    assert holm([]) == [] and holm([None]) == [None]
