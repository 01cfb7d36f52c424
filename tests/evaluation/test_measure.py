"""Evidence recall and means against direct statements of them."""

from typing import ClassVar

import pytest
import torch

from vtc.evaluation.measure import SampleCounts, evidence_numbers, means, token_numbers
from vtc.types import Selection

pytestmark = pytest.mark.eval

GRID = (1, 3, 4)
# 12 tokens of 10×10 pixels; the box holds tokens 1, 2, 5 and 6
SIZE, BOX = (40, 30), (10, 0, 30, 20)


def selection(*kept, merge=None):
    width = max(map(len, kept))
    keep = torch.tensor([[*k, *[0] * (width - len(k))] for k in kept], dtype=torch.int64)
    valid = torch.tensor([[i < len(k) for i in range(width)] for k in kept]).bool()
    parent = torch.stack([torch.arange(len(kept)), torch.arange(len(kept))], -1)
    return Selection(keep, valid, (12,) * len(kept), parent, (GRID,) * len(kept), merge=merge)


@pytest.mark.parametrize(
    ("kept", "recall"),
    [((1, 2, 5, 6), 1.0), ((0, 1, 11), 0.25), ((0, 3), 0.0), (tuple(range(12)), 1.0)],
)
def test_recall_is_the_share_of_the_box_that_was_kept(kept, recall):
    found = evidence_numbers({"evidence": [BOX]}, SIZE, [selection((0,), kept)], 1)
    assert found == {"evidence_recall": recall}


def test_several_boxes_count_a_token_once():
    boxes = [BOX, BOX, (0, 20, 10, 30)]
    found = evidence_numbers({"evidence": boxes}, SIZE, [selection((1, 8))], 0)
    assert found == {"evidence_recall": 2 / 5}


def test_members_of_merged_tokens_are_covered_but_not_recalled():
    # slot 2 is appended and holds tokens 2, 5 and, with weight 0, nothing of token 6
    merge = (
        torch.tensor([[2, 2, 2]]),
        torch.tensor([[2, 5, 6]]),
        torch.tensor([[0.5, 0.5, 0.0]]),
    )
    found = evidence_numbers({"evidence": [BOX]}, SIZE, [selection((0, 1), merge=merge)], 0)
    assert found == {"evidence_recall": 1 / 4, "evidence_covered": 3 / 4}


def test_nothing_kept_as_it_is_has_no_recall():
    merge = (torch.tensor([[0, 0]]), torch.tensor([[1, 9]]), torch.tensor([[0.5, 0.5]]))
    found = evidence_numbers({"evidence": [BOX]}, SIZE, [selection((), merge=merge)], 0)
    assert found == {"evidence_covered": 1 / 4}


def test_of_a_picture_that_later_cuts_empty_the_last_that_left_some_counts():
    def left(first, second):
        mask = torch.zeros(2, 12, dtype=torch.bool)
        mask[0, list(first)] = mask[1, list(second)] = True
        parent = torch.stack([torch.arange(2)] * 2, -1)
        return Selection.of_mask(mask, (12, 12), parent, (GRID,) * 2)

    cuts = [left((1, 2), (1, 5, 6)), left((), (1,)), left((), ())]
    doc = {"evidence": [BOX]}
    assert evidence_numbers(doc, SIZE, cuts, 0) == {"evidence_recall": 2 / 4}
    assert evidence_numbers(doc, SIZE, cuts, 1) == {"evidence_recall": 1 / 4}


@pytest.mark.parametrize(
    "doc",
    [
        {},
        {"evidence": None},
        {"evidence": []},
        # what other data sets keep under this name
        {"evidence": "page 3"},
        {"evidence": ["page 3"]},
        {"evidence": [[1, 2]]},
        {"evidence": ["abcd"]},
    ],
)
def test_questions_without_boxes_have_none(doc):
    assert evidence_numbers(doc, SIZE, [selection((1,))], 0) == {}


def test_crops_and_calls_without_selections_have_none():
    whole = selection((1,), (2,))
    crops = Selection(whole.keep, whole.valid, whole.lengths, torch.zeros(2, 2), whole.grid)
    assert evidence_numbers({"evidence": [BOX]}, SIZE, [crops], 0) == {}
    assert evidence_numbers({"evidence": [BOX]}, SIZE, [], 0) == {}


def test_means_are_over_the_samples_that_have_a_number():
    found = means([{"a": 1, "b": None}, {"a": 2}, {"c": 0.5, "b": 3, "d": "torch", "e": [1.0]}])
    assert found == {"a": 1.5, "c": 0.5, "b": 3.0}


class Report:
    visual_tokens, llm_tokens = (196, 100, 196), (22, 60, 98)
    kept_tokens = (22, 50, 98)
    kept_fractions = (22 / 196, 0.5, 0.5)
    active_fractions = (0.1, 0.4, 0.25)
    kernels: ClassVar = {"entropy": "torch", "gather": "triton", "top_k": "triton"}
    encoder_ms = selector_ms = ttft_ms = tpot_ms = kv_bytes = peak_memory_bytes = 1.0


def test_a_sample_counts_its_own_pictures_and_only_alone_has_times():
    found = token_numbers(Report, range(1, 3), alone=False)
    assert (found["visual_tokens"], found["llm_tokens"], found["kept_tokens"]) == (296, 158, 148)
    assert found["kept_fraction"] == 0.5 and found["ttft_ms"] is None
    # weighted by tokens: 40 of 100 and 49 of 196
    assert found["active_fraction"] == 89 / 296
    assert found["layer_mean_tokens"] == 89
    assert found["image_kept_fractions"] == [0.5, 0.5]
    assert found["kernels"] == "triton: gather top_k; torch: entropy"
    assert token_numbers(Report, range(1), alone=True)["ttft_ms"] == 1.0


def test_lmms_eval_writes_our_numbers_beside_its_own():
    found = SampleCounts(output_tokens=3, numbers={"kept_fraction": 0.5}).to_dict()
    assert (found["output_tokens"], found["kept_fraction"]) == (3, 0.5)
