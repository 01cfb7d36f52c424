"""Rows against the definitions of what they hold, on samples made by hand."""

import numpy as np
import pytest

from vtc.evaluation import table
from vtc.evaluation.statistics import difference_interval

pytestmark = pytest.mark.eval

FULL = [1, 1, 1, 1, 1, 1, 1, 0]
CELLS = {
    ("none", "keep", None, 0): FULL,
    ("vtc_cls", "keep", 0.5, 0): [1, 1, 1, 1, 1, 1, 0, 0],
    ("vtc_cls", "renumber", 0.5, 0): [1, 1, 1, 1, 1, 0, 0, 0],
    ("random", "keep", 0.5, 0): [1, 1, 1, 0, 0, 0, 0, 0],
    ("random", "keep", 0.5, 1): [0, 1, 1, 1, 1, 0, 0, 0],
    ("random", "renumber", 0.5, 0): [1, 0, 0, 0, 0, 0, 0, 0],
    ("random", "renumber", 0.5, 1): [0, 0, 0, 0, 0, 0, 0, 1],
    ("uniform", "keep", 0.5, 0): [1, 0, 1, 0, 1, 0, 1, 0],
}


@pytest.fixture
def both(samples_frame):
    return table.tables(samples_frame(CELLS))


def one(rows, **wanted):
    (row,) = [r for r in rows if all(r[k] == v for k, v in wanted.items())]
    return row


def test_a_row_per_cell_and_one_per_budget_with_seeds_averaged(both):
    rows, summary = both
    assert len(rows) == len(CELLS) and len(summary) == len(CELLS) - 2
    row = one(summary, method="random", positions="keep")
    assert (row["seeds"], row["seed"], row["n"]) == (2, None, 8)
    assert row["accuracy"] == 7 / 16
    assert one(rows, method="random", positions="keep", seed=1)["accuracy"] == 4 / 8


def test_differences_are_paired_with_the_full_model_and_with_random_of_the_same_policy(both):
    _, summary = both
    means = {
        p: np.mean([CELLS["random", p, 0.5, s] for s in (0, 1)], axis=0)
        for p in ("keep", "renumber")
    }
    for row in summary:
        if row["method"] in ("none", "random"):
            assert row["vs_random"] is None
            continue
        own = np.array(CELLS[row["method"], row["positions"], 0.5, 0], float)
        expected = difference_interval(own, np.array(FULL, float))
        assert (row["vs_full"], row["vs_full_low"], row["vs_full_high"]) == expected
        expected = difference_interval(own, means[row["positions"]])
        assert (row["vs_random"], row["vs_random_low"], row["vs_random_high"]) == expected


def test_another_position_policy_is_compared_with_original_ids(both):
    rows, summary = both
    for row in (*rows, *summary):
        if row["positions"] == "keep":
            assert row["vs_original_ids"] is None
            continue
        seeds = (0, 1) if row["seed"] is None else (row["seed"],)
        own, other = (
            np.mean([CELLS[row["method"], positions, 0.5, s] for s in seeds], axis=0)
            for positions in (row["positions"], "keep")
        )
        ends = [row[f"vs_original_ids{end}"] for end in ("", "_low", "_high")]
        assert tuple(ends) == difference_interval(own, other)


def test_pairing_is_by_question_not_by_order(samples_frame):
    frame = samples_frame(CELLS)
    shuffled = frame.sample(frac=1, random_state=0)
    shuffled = shuffled.sort_values(["label", "positions", "seed"], kind="stable")
    key = ("method", "positions", "seed")
    before = {tuple(r[k] for k in key): r for r in table.tables(frame)[0]}
    after = {tuple(r[k] for k in key): r for r in table.tables(shuffled)[0]}
    assert after == before


def test_a_number_that_says_nothing_is_none(both):
    row = one(both[1], method="uniform")
    assert row["evidence_recall"] is None and row["ttft_ms"] is None and row["n_timed"] == 0


def test_a_method_over_layers_is_compared_with_random_layers_and_not_with_random_tokens(
    samples_frame,
):
    cells = {
        **{key: value for key, value in CELLS.items() if key[0] in ("none", "random")},
        ("shortv", "keep", 0.5, 0): [1, 1, 1, 1, 0, 0, 0, 0],
        ("naavit", "keep", 0.5, 0): [1, 1, 1, 1, 0, 0, 0, 0],
        ("shortv:scorer=random", "keep", 0.5, 0): [1, 0, 1, 0, 0, 0, 0, 0],
        ("shortv:scorer=random", "keep", 0.5, 1): [1, 0, 0, 0, 0, 0, 0, 0],
    }
    _, summary = table.tables(samples_frame(cells))
    row = one(summary, label="shortv")
    mean = np.mean([v for k, v in cells.items() if k[0] == "shortv:scorer=random"], axis=0)
    expected = difference_interval(np.array(cells["shortv", "keep", 0.5, 0], float), mean)
    assert (row["vs_random"], row["vs_random_low"], row["vs_random_high"]) == expected
    for label in ("naavit", "shortv:scorer=random"):
        assert one(summary, label=label)["vs_random"] is None


def test_times_are_paired_with_the_full_models(samples_frame):
    frame = samples_frame({("uniform", "keep", 0.5, 0): [0] * 6})
    frame["ttft_ms"] = [10.0, 30.0, 25.0, None, 20.0, 12.0]
    frame["full_ttft_ms"] = [20.0, 40.0, 50.0, None, None, 10.0]
    frame["ttft_ratio"] = frame["ttft_ms"] / frame["full_ttft_ms"]
    (row,) = table.tables(frame)[1]
    assert (row["ttft_ms"], row["ttft_ratio"], row["n_timed"]) == (20.0, 0.625, 5)
    spread = row["ttft_ratio_p20"], row["ttft_ratio_p80"]
    assert spread == pytest.approx(tuple(np.percentile([0.5, 0.75, 0.5, 1.2], [20, 80])))


def test_curves_of_layers_fall_in_what_is_active(samples_frame):
    cells = {("none", "keep", None, 0): [1], **{("shortv", "keep", k, 0): [1] for k in (0.2, 0.8)}}
    summary = table.tables(samples_frame(cells))[1]
    (points,) = table.curves(summary, "active_fraction").values()
    assert [p["active_fraction"] for p in points] == [1.0, 0.8, 0.2]
    assert not table.drops_tokens(points)


def test_one_token_and_everything_are_two_budgets(samples_frame):
    frame = samples_frame(
        {("uniform", "keep", "1tok", 0): [0, 0], ("uniform", "keep", 1.0, 0): [1, 1]}
    )
    assert [r["keep"] for r in table.tables(frame)[1]] == ["1tok", "1.0"]


def test_curves_start_at_the_full_model_and_fall_in_what_is_kept(samples_frame):
    cells = {("none", "keep", None, 0): [1], **{("uniform", "keep", k, 0): [1] for k in (0.1, 0.5)}}
    (points,) = table.curves(table.tables(samples_frame(cells))[1]).values()
    assert [p["kept_fraction"] for p in points] == [1.0, 0.5, 0.1]


def test_a_row_finds_its_samples_again(samples_frame):
    frame = samples_frame(CELLS)
    rows, summary = table.tables(frame)
    assert sum(len(table.pick(frame, row)) for row in rows) == len(frame)
    assert sum(len(table.pick(frame, row)) for row in summary) == len(frame)
    row = one(rows, method="random", positions="renumber", seed=1)
    assert table.pick(frame, row)["score"].tolist() == CELLS["random", "renumber", 0.5, 1]
