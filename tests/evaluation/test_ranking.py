"""Areas against integrals worked out by hand, and what is said about order."""

import numpy as np
import pytest
from scipy import integrate

from vtc.evaluation import orders, table
from vtc.evaluation.ranking import ranking
from vtc.evaluation.statistics import holm

pytestmark = pytest.mark.eval

N = 64
FULL = [1.0] * 48 + [0.0] * 16


def right(count):
    return [1.0] * count + [0.0] * (N - count)


def cells(**curves):
    """Right answers by method at keeps 0.5, 0.25 and 0.125, on the full model's 48."""
    found = {("none", "keep", None, 0): FULL}
    for name, counts in curves.items():
        for keep, count in zip((0.5, 0.25, 0.125), counts, strict=False):
            found[name, "keep", keep, 0] = right(count)
    return found


@pytest.fixture
def ranked(samples_frame):
    def rank(given):
        frame = samples_frame(given)
        return ranking(frame, table.tables(frame)[1])

    return rank


def one(rows, label):
    (row,) = [row for row in rows if row["label"] == label]
    return row


def test_the_area_is_a_mean_over_halvings_between_measured_points(ranked):
    rows = ranked(cells(vtc_cls=(48, 36, 24), random=(36, 24, 12)))
    # three halvings of equal width, each with the mean of its two ends: 48 48 36 24 of 48
    assert one(rows, "vtc_cls")["area"] == pytest.approx((1 + 0.875 + 0.625) / 3)
    assert one(rows, "random")["area"] == pytest.approx((0.875 + 0.625 + 0.375) / 3)
    assert [row["rank"] for row in rows] == [1, 2]
    assert {row["left"] for row in rows} == {0.125} and {row["budgets"] for row in rows} == {3}


def test_as_good_as_the_full_model_everywhere_is_everything(ranked):
    row = one(ranked(cells(vtc_cls=(48, 48, 48), random=(9, 9, 9))), "vtc_cls")
    assert (row["area"], row["area_low"], row["area_high"]) == (1.0, 1.0, 1.0)


def test_a_curve_that_keeps_less_is_cut_where_random_ends(samples_frame):
    frame = samples_frame(cells(downsample=(48, 24, 0), random=(36, 24, 12)))
    smaller = frame["label"] == "downsample"
    frame.loc[smaller, "kept_fraction"] = frame.loc[smaller, "kept_fraction"] * 0.75
    row = one(ranking(frame, table.tables(frame)[1]), "downsample")
    x, y = np.log2([0.09375, 0.1875, 0.375, 1.0]), np.array([0, 24, 48, 48]) / 48
    fine = np.linspace(-3, 0, 100_001)
    expected = integrate.simpson(np.interp(fine, x, y), x=fine) / 3
    assert row["area"] == pytest.approx(expected, abs=1e-6)


def test_methods_without_such_a_curve_are_not_ranked(ranked):
    given = cells(random=(36, 24, 12), vtc_cls=(48, 36))
    given["shortv", "keep", 0.5, 0] = FULL
    given["ima_skip", "keep", None, 0] = FULL
    # vtc_cls was not measured at the smallest budget
    assert [row["label"] for row in ranked(given)] == ["random"]


def test_areas_are_compared_question_by_question_and_corrected_together(ranked):
    rows = ranked(
        cells(
            vtc_cls=(46, 40, 34), uniform=(30, 22, 11), random=(30, 21, 11), downsample=(31, 20, 9)
        )
    )
    best = rows[0]
    assert best["label"] == "vtc_cls"
    assert best["vs_random"] == pytest.approx(best["area"] - one(rows, "random")["area"])
    assert best["vs_random_low"] > 0 and best["p_random_holm"] < 0.01
    assert one(rows, "uniform")["p_random_holm"] > 0.05
    assert one(rows, "random")["p_random"] is None
    for name in ("p_random", "p_downsample"):
        assert [row[f"{name}_holm"] for row in rows] == holm(row[name] for row in rows)


def test_one_question_is_ranked_without_intervals(samples_frame):
    given = cells(vtc_cls=(1, 1, 1), random=(1, 1, 0), downsample=(1, 0, 0))
    frame = samples_frame({key: scores[:1] for key, scores in given.items()})
    rows = ranking(frame, table.tables(frame)[1])
    assert [row["label"] for row in rows] == ["vtc_cls", "random", "downsample"]
    assert rows[0]["vs_random"] > 0 and rows[0]["vs_random_low"] is None
    assert rows[0]["p_random"] == 1.0
    assert " points [n/a] over random" in orders.best(rows)[0]


def test_seeds_are_averaged_by_question(ranked):
    given = cells(random=(36, 24, 12))
    given |= {("random", "keep", k, 1): FULL for k in (0.5, 0.25, 0.125)}
    assert one(ranked(given), "random")["area"] == pytest.approx((0.625 + 1) / 2)


def test_the_best_is_named_with_what_it_is_better_than(ranked):
    rows = ranked(cells(vtc_cls=(46, 40, 34), random=(30, 21, 11), downsample=(31, 20, 9)))
    (line,) = orders.best(rows)
    assert line.startswith("largest area of 3 curves: vtc_cls (keep) with ")
    assert " over random, p" in line and line.endswith("after Holm")
    (line,) = orders.best(ranked(cells(vtc_cls=(20, 15, 9), random=(36, 24, 12))))
    assert line.startswith("largest area of 2 curves: random (keep)") and "baseline itself" in line


def said(samples_frame, given):
    frame = samples_frame(given)
    summary = table.tables(frame)[1]
    return orders.leaders(summary), orders.crossings(frame, summary)


def test_a_first_place_that_depends_on_the_budget_is_named(samples_frame):
    given = cells(vtc_cls=(47, 30, 20), todre=(46, 31, 20), random=(20, 15, 10))
    (line,), crossings = said(samples_frame, given)
    assert line.endswith("(keep): vtc_cls at 0.5, todre at 0.25, vtc_cls and todre at 0.125")
    # one question more or less is no crossing
    assert crossings == []


def test_who_shares_the_first_place_is_first(samples_frame):
    given = cells(vtc_cls=(47, 30, 20), todre=(47, 31, 20), random=(20, 15, 10))
    assert said(samples_frame, given) == ([], [])
    (line,), _ = said(samples_frame, cells(vtc_cls=(47, 30, 20), todre=(47, 31, 19)))
    assert line.endswith("(keep): vtc_cls and todre at 0.5, todre at 0.25, vtc_cls at 0.125")


def test_methods_that_beat_each_other_at_different_budgets_change_places(samples_frame):
    given = cells(vtc_cls=(47, 30, 5), todre=(20, 30, 32), random=(20, 15, 10))
    _, (line,) = said(samples_frame, given)
    assert line == (
        "vtc_cls (keep) and todre (keep) change places: +42.2 points at keep=0.5, "
        "-42.2 points at keep=0.125"
    )


def test_one_method_that_is_first_everywhere_gives_no_sentence(samples_frame):
    given = cells(vtc_cls=(47, 40, 30), todre=(40, 30, 20), random=(20, 15, 10))
    assert said(samples_frame, given) == ([], [])
