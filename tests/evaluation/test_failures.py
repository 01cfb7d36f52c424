"""What is shown as broken by pruning was right before, is wrong now, and is the most telling."""

import pytest

from vtc.evaluation import table
from vtc.evaluation.failures import failures

pytestmark = pytest.mark.eval

CELLS = {
    ("none", "keep", None, 0): [1, 1, 1, 1, 1, 0],
    ("vtc_cls", "keep", 0.5, 0): [1, 1, 1, 0, 1, 1],
    ("vtc_cls", "keep", 0.1, 0): [0, 0, 0, 0, 1, 0],
    ("flowcut", "keep", 0.1, 0): [0, 1, 0, 1, 1, 0],
    ("random", "keep", 0.1, 0): [0, 1, 1, 1, 0, 0],
    ("random", "keep", 0.1, 1): [1, 1, 1, 1, 1, 1],
    ("uniform", "keep", 0.1, 0): [0, 0, 0, 0, 0, 0],
}
KINDS = ["color", "color", "count", "count", "where", "where"]
EVIDENCE = [0.9, 0.1, 0.8, 0.5, 0.0, 0.0]


@pytest.fixture
def given(samples_frame):
    frame = samples_frame(CELLS)
    frame["kind"] = [KINDS[i] for i in frame["doc_id"]]
    frame["evidence_recall"] = [EVIDENCE[i] for i in frame["doc_id"]]
    frame["answer"] = [f" {label} " for label in frame["label"]]
    rows = table.tables(frame)[1]
    shown = [row for row in rows if row["keep"] in ("0.1", "adaptive", "1.0")]
    return frame, rows, [row for row in rows if row["label"] == "none"] + shown


def found(given, limit=12):
    return failures(*given, limit)


def test_the_full_model_is_right_and_the_method_wrong(given):
    frame, _, _ = given
    assert found(given)
    for failure in found(given):
        doc = failure.sample["doc_id"]
        assert CELLS["none", "keep", None, 0][doc] == 1
        assert failure.sample["score"] == 0 and failure.full_answer == "none"
        own = frame[(frame["label"] == failure.row["label"]) & (frame["keep"] == "0.1")]
        assert own[own["doc_id"] == doc]["score"].iloc[0] == 0


def test_least_evidence_first_and_every_kind_before_a_second_of_one(given):
    own = [f.sample["doc_id"] for f in found(given) if f.row["label"] == "vtc_cls"]
    # 2 has less evidence left than 0, of kinds that are there already
    assert own == [1, 3, 2]


def test_methods_stand_before_baselines_and_only_two_of_these_do(given):
    labels = list(dict.fromkeys(f.row["label"] for f in found(given)))
    assert labels == ["vtc_cls", "flowcut", "random"]


def test_a_question_is_shown_again_only_behind_new_ones(given):
    # 2 has less evidence left than 0, but stands for vtc_cls already
    own = [f.sample["doc_id"] for f in found(given) if f.row["label"] == "flowcut"]
    assert own == [0, 2]


def test_who_else_is_right_and_which_other_budgets_are_wrong(given):
    first = found(given)[0]
    assert (first.also, first.answered_by) == ([], ["flowcut", "random"])
    second = found(given)[1]
    assert (second.sample["doc_id"], second.also) == (3, ["0.5"])


def test_of_several_seeds_the_first_is_shown(given):
    own = [f for f in found(given) if f.row["label"] == "random"]
    assert own and all(f.sample["seed"] == 0 for f in own)


def test_no_more_than_asked_for(given):
    assert len(found(given, 2)) == 2


def test_nothing_broken_is_nothing_shown(samples_frame):
    frame = samples_frame({("none", "keep", None, 0): [1, 0], ("vtc_cls", "keep", 0.1, 0): [1, 0]})
    frame["answer"] = "yes"
    rows = table.tables(frame)[1]
    assert failures(frame, rows, rows, 9) == []
