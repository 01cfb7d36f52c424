"""What rows are compared with: tests, their correction, what downsampling breaks; accounting."""

import numpy as np
import pytest

from vtc.errors import VtcError
from vtc.evaluation import table
from vtc.evaluation.broken import LEAST
from vtc.evaluation.statistics import accuracy_interval, holm, mcnemar, ratio_interval

pytestmark = pytest.mark.eval

N = 60


def right(*spans):
    """Right answers to the questions of the spans."""
    found = np.zeros(N)
    for start, stop in spans:
        found[start:stop] = 1.0
    return found.tolist()


FULL = right((0, 50))
CELLS = {
    ("none", "keep", None, 0): FULL,
    ("vtc_cls", "keep", 0.5, 0): right((0, 44)),
    ("vtc_cls", "renumber", 0.5, 0): right((0, 36)),
    ("vtc_cls", "keep", 0.1, 0): right((0, 20)),
    ("random", "keep", 0.5, 0): right((0, 20)),
    ("random", "keep", 0.5, 1): right((10, 34)),
    ("random", "keep", 0.5, 2): right((0, 30)),
    ("random", "renumber", 0.5, 0): right((0, 10)),
    ("random", "keep", 0.1, 0): right((0, 18)),
    ("downsample", "keep", 0.5, 0): right((0, 36)),
    ("downsample", "keep", 0.1, 0): right((0, 47), (52, 55)),
}


def find(rows, label, keep, positions="keep", seed=0):
    names = ("label", "keep", "positions", "seed")
    (row,) = [r for r in rows if tuple(r[n] for n in names) == (label, keep, positions, seed)]
    return row


def array(*key):
    return np.array(CELLS[key])


@pytest.fixture
def summary(samples_frame):
    return table.tables(samples_frame(CELLS))[1]


def test_every_row_is_tested_against_random_and_downsample_of_its_keep(summary):
    row = find(summary, "vtc_cls", "0.5")
    seeds = [array("random", "keep", 0.5, seed) for seed in (0, 1, 2)]
    own, smaller = array("vtc_cls", "keep", 0.5, 0), array("downsample", "keep", 0.5, 0)
    assert row["p_random"] == mcnemar([own], seeds)
    assert row["p_downsample"] == mcnemar([own], [smaller])
    assert row["vs_downsample"] == pytest.approx(own.mean() - smaller.mean())
    # downsample was run under one policy, which counts for the others too
    other = find(summary, "vtc_cls", "0.5", "renumber")
    own = array("vtc_cls", "renumber", 0.5, 0)
    assert other["p_random"] == mcnemar([own], [array("random", "renumber", 0.5, 0)])
    assert other["p_downsample"] == mcnemar([own], [smaller])


def test_a_smaller_picture_with_options_is_compared_like_any_method(samples_frame):
    label = "downsample:selector=grid_pool"
    cells = {key: scores for key, scores in CELLS.items() if key[0] != "downsample"}
    cells[label, "keep", 0.5, 0] = right((0, 41))
    cells |= {key: scores for key, scores in CELLS.items() if key[0] == "downsample"}
    summary = table.tables(samples_frame(cells))[1]
    smaller = array("downsample", "keep", 0.5, 0)
    own = array("vtc_cls", "keep", 0.5, 0)
    assert find(summary, "vtc_cls", "0.5")["p_downsample"] == mcnemar([own], [smaller])
    own = np.array(cells[label, "keep", 0.5, 0])
    assert find(summary, label, "0.5")["p_downsample"] == mcnemar([own], [smaller])
    assert find(summary, "downsample", "0.5")["p_downsample"] is None


def test_nothing_is_tested_against_itself_or_at_another_keep(summary):
    for row in summary:
        if row["label"] == "none":
            assert row["p_random"] is row["p_downsample"] is row["p_random_holm"] is None
        if row["label"] == "random":
            assert row["p_random"] is None and row["vs_random"] is None
        if row["label"] == "downsample":
            assert row["p_downsample"] is None and row["broken_n"] is None


def test_the_correction_is_over_all_rows_of_a_keep(samples_frame):
    for rows in table.tables(samples_frame(CELLS)):
        for keep in ("0.5", "0.1"):
            for name in ("p_random", "p_downsample"):
                same = [row for row in rows if row["keep"] == keep]
                assert [r[f"{name}_holm"] for r in same] == holm(r[name] for r in same)
        assert any(r["p_random_holm"] != r["p_random"] for r in rows)


def test_models_and_tasks_are_compared_and_corrected_apart(samples_frame):
    import pandas as pd

    alone = table.tables(samples_frame(CELLS))[1]
    worse = {key: [0.0] * N for key in CELLS}
    frames = [
        samples_frame(CELLS),
        samples_frame(worse, model="other"),
        samples_frame(worse, task="u"),
    ]
    together = table.tables(pd.concat(frames, ignore_index=True))[1]
    assert together[: len(alone)] == alone
    assert len(together) == 3 * len(alone)
    assert len(table.curves(together)) == 3 * len(table.curves(alone))


def test_accuracy_relative_to_the_full_model(summary):
    for row in summary:
        if row["seeds"] == 1:
            key = (row["label"], row["positions"])
            keep = None if row["label"] == "none" else float(row["keep"])
            expected = ratio_interval(array(*key, keep, 0), np.array(FULL))
            names = ("relative_accuracy", "relative_accuracy_low", "relative_accuracy_high")
            assert tuple(row[name] for name in names) == expected
    assert find(summary, "none", "1.0")["relative_accuracy"] == 1.0


def test_what_downsampling_breaks_and_who_answers_it(summary):
    row = find(summary, "vtc_cls", "0.5")
    # the full model answers 50, the smaller picture the first 36 of them
    assert (row["broken_n"], row["broken_share"]) == (14, 14 / 50)
    names = ("broken_accuracy", "broken_accuracy_low", "broken_accuracy_high")
    assert tuple(row[name] for name in names) == accuracy_interval(right_array(8, 14))
    # random's seeds answer none of them
    assert find(summary, "random", "0.5", seed=None)["broken_accuracy"] == 0.0


def right_array(count, n):
    return np.array([1.0] * count + [0.0] * (n - count))


def test_too_few_broken_questions_have_no_accuracy(summary):
    row = find(summary, "vtc_cls", "0.1")
    # what the smaller picture answers and the full model does not is not broken
    assert row["broken_n"] == 3 < LEAST
    assert row["broken_accuracy"] is row["broken_accuracy_low"] is None


def test_methods_without_a_budget_in_tokens_have_no_smaller_picture(samples_frame):
    cells = {
        ("none", "keep", None, 0): FULL,
        ("shortv", "keep", 0.5, 0): FULL,
        ("ima_skip", "keep", None, 0): FULL,
        ("downsample", "keep", 0.5, 0): right((0, 5)),
    }
    for row in table.tables(samples_frame(cells))[1]:
        assert row["vs_downsample"] is row["p_downsample"] is row["broken_n"] is None


def test_cells_with_other_questions_are_refused(samples_frame):
    frame = samples_frame(CELLS)
    with pytest.raises(VtcError, match=r"vtc_cls at keep=0.1 answered 59 questions.*the 60 that"):
        missing = (frame["label"] == "vtc_cls") & (frame["keep"] == "0.1") & (frame["doc_id"] == 7)
        table.tables(frame[~missing])


def test_the_realized_share_is_a_distribution_over_images(samples_frame):
    frame = samples_frame({("uniform", "keep", 0.5, 0): [1, 1, 0]})
    # two pictures, one, none
    frame["image_kept_fractions"] = [[0.5, 0.1], [0.9], []]
    frame["kept_fraction"] = [0.3, 0.9, None]
    frame["kernels"] = ["torch", "triton: top_k", "torch"]
    frame["flops"] = [10.0, None, None]
    (row,) = table.tables(frame)[1]
    assert (row["kept_min"], row["kept_p50"], row["kept_max"]) == (0.1, 0.5, 0.9)
    assert row["kept_mean"] == pytest.approx(0.5)
    assert (row["kept_p20"], row["kept_p80"]) == pytest.approx((0.26, 0.74))
    assert row["kernels"] == "torch | triton: top_k" and row["flops"] == 10.0


def test_a_method_with_one_image_per_question_has_the_shares_of_its_questions(summary):
    row = find(summary, "vtc_cls", "0.5")
    assert {row[f"kept_{name}"] for name in ("mean", "min", "p20", "p50", "p80", "max")} == {0.5}
