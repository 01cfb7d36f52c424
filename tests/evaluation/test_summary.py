"""The sentences on top say what the rows say, and no more."""

import pytest

from vtc.evaluation import table
from vtc.evaluation.summary import at_a_glance, verdicts

pytestmark = pytest.mark.eval

N = 40


def right(count):
    return [1] * count + [0] * (N - count)


CELLS = {
    ("none", "keep", None, 0): right(40),
    ("vtc_cls", "keep", 0.5, 0): right(39),
    ("vtc_cls", "keep", 0.1, 0): right(10),
    ("flowcut", "keep", 0.5, 0): right(38),
    ("flowcut", "keep", 0.1, 0): right(30),
    ("random", "keep", 0.5, 0): right(38),
    ("random", "keep", 0.1, 0): right(28),
    ("downsample", "keep", 0.5, 0): right(20),
    ("downsample", "keep", 0.1, 0): right(11),
}


@pytest.fixture
def summary(samples_frame):
    return table.tables(samples_frame(CELLS))[1]


def test_a_baseline_beats_what_scores_lower_than_it_somewhere(summary):
    random, smaller = verdicts(summary)
    assert (random.tried, smaller.tried) == (2, 2)
    assert random.beaten == ["vtc_cls (-45.0 at keep=0.1)"] and random.clearly == ["vtc_cls"]
    # one question of forty is no clear difference
    assert smaller.beaten == ["vtc_cls (-2.5 at keep=0.1)"] and smaller.clearly == []


def test_one_question_is_no_clear_difference(samples_frame):
    cells = {key: [1.0] for key in CELLS} | {("vtc_cls", "keep", 0.1, 0): [0.0]}
    for found in verdicts(table.tables(samples_frame(cells))[1]):
        assert found.beaten == ["vtc_cls (-100.0 at keep=0.1)"] and found.clearly == []


def test_baselines_are_not_among_the_beaten(samples_frame):
    cells = {**CELLS, ("uniform", "keep", 0.1, 0): right(0)}
    found = verdicts(table.tables(samples_frame(cells))[1])
    assert all("uniform" not in " ".join(one.beaten) and one.tried == 2 for one in found)


def test_the_best_method_near_eleven_percent_is_named_beside_the_baselines(summary):
    assert at_a_glance(summary) == (
        "With 10 % of the tokens, the best method is flowcut: 75 % right. "
        "Beside it: random 70 %, downsample 28 %."
    )


def test_without_a_method_nothing_is_the_best(samples_frame):
    cells = {key: value for key, value in CELLS.items() if key[0] in ("none", "random")}
    summary = table.tables(samples_frame(cells))[1]
    assert at_a_glance(summary) == "" and verdicts(summary) == []
