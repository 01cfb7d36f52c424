"""Masks of what was left come back as they were, whatever pictures and methods they are of."""

import numpy as np
import pytest
import torch

from vtc.errors import InputError
from vtc.evaluation.kept import Kept, left_of, packed
from vtc.types import Selection

pytestmark = pytest.mark.eval


def of_masks(masks, parent, grid):
    lengths = [len(mask) for mask in masks]
    padded = torch.zeros(len(masks), max(lengths), dtype=torch.bool)
    for i, mask in enumerate(masks):
        padded[i, : len(mask)] = torch.tensor(mask)
    return Selection.of_mask(padded, lengths, torch.tensor(parent), grid)


@pytest.fixture
def selection():
    """Two pictures: the first in two crops of 6 and 3 tokens, the second of 4."""
    masks = [[True, False] * 3, [False, True, True], [True, False, False, True]]
    return of_masks(masks, [[0, 0], [0, 0], [1, 0]], [(1, 2, 3), (1, 1, 3), (1, 2, 2)])


def test_masks_come_back(selection, tmp_path):
    samples = [left_of([selection], 1, 0), [], left_of([selection], 0, 0)]
    file = tmp_path / "a.kept.npz"
    file.write_bytes(packed(samples))
    found = Kept.read(file)
    assert found[1] == []
    for i, sample in enumerate(samples):
        for one, other in zip(sample, found[i], strict=True):
            assert (one.visual, one.grid) == (other.visual, other.grid)
            assert np.array_equal(one.kept, other.kept)
            assert np.array_equal(one.covered, other.covered)
    assert [left.grid for left in found[2]] == [(1, 2, 3), (1, 1, 3)]
    assert [left.kept.sum() for left in found[2]] == [3, 2]


def test_the_same_masks_are_the_same_bytes(selection):
    sample = left_of([selection], 0, 0)
    assert packed([sample]) == packed([sample])


def test_members_of_merged_tokens_are_covered(selection):
    merge = (torch.tensor([[1, 1]]), torch.tensor([[1, 3]]), torch.tensor([[0.5, 0.0]]))
    keep = torch.tensor([[0]])
    merged = Selection(
        keep, keep >= 0, (4,), torch.tensor([[0, 0]]), ((1, 2, 2),), None, None, merge
    )
    (left,) = left_of([merged], 0, 0)
    assert left.kept.tolist() == [True, False, False, False]
    assert left.covered.tolist() == [True, True, False, False]


def test_the_last_decision_that_left_any_counts():
    def one(*kept):
        return of_masks([[i in kept for i in range(4)]], [[0, 0]], [(1, 2, 2)])

    (left,) = left_of([one(0, 1, 2), one(1, 2), one()], 0, 0)
    assert left.kept.tolist() == [False, True, True, False]
    assert left_of([one()], 0, 0) == left_of([], 0, 0) == left_of([one(0)], 3, 0) == []


def test_no_questions_and_no_pictures():
    assert Kept.read(packed([]))[0] == [] == Kept.read(packed([[], []]))[1]


@pytest.mark.parametrize("length", [0, 1, 30, 200])
def test_half_a_file_is_refused(selection, length):
    whole = packed([left_of([selection], 0, 0)])
    with pytest.raises(InputError, match="these masks cannot be read"):
        Kept.read(whole[:length])
