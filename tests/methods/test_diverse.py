"""The selectors for diversity against their plainest statement."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import vtc
from vtc import ops
from vtc.selectors import FarthestPoint, MaxSum
from vtc.types import Tokens

OBJECTIVES = ["max_sum", "k_center"]
SELECTORS = {"max_sum": MaxSum(), "k_center": FarthestPoint()}
DEGREES = [0, 10, 20, 90, 100, 170]


def naive(x: list[list[float]], pivot: int, k: int, objective: str) -> list[int]:
    """The order of choice, in Python floats."""

    def cosine(a: list[float], b: list[float]) -> float:
        norm = math.hypot(*a) * math.hypot(*b)
        return sum(p * q for p, q in zip(a, b, strict=True)) / norm if norm else 0.0

    chosen = [pivot]
    while len(chosen) < k:
        put = sum if objective == "max_sum" else max
        likeness = {
            i: put([cosine(x[i], x[c]) for c in chosen]) for i in range(len(x)) if i not in chosen
        }
        chosen.append(min(likeness, key=lambda i: (likeness[i], i)))
    return chosen


def tokens_of(features: torch.Tensor, valid: torch.Tensor) -> Tokens:
    grid = tuple((1, 1, int(n)) for n in valid.sum(-1))
    return Tokens(features, valid, grid, torch.tensor([[g, g] for g in range(len(valid))]))


def fan() -> torch.Tensor:
    angle = torch.tensor(DEGREES) * math.pi / 180
    return torch.stack([angle.cos(), angle.sin()], -1)[None]


@pytest.mark.parametrize(
    ("objective", "k", "want"),
    [
        ("max_sum", 4, [1, 5, 0, 4]),
        ("max_sum", 5, [1, 5, 0, 4, 2]),
        ("k_center", 3, [1, 5, 3]),  # the fourth is an exact tie in real arithmetic
    ],
)
def test_vectors_at_angles(objective: Any, k: int, want: list[int]) -> None:
    valid = torch.ones(1, 6, dtype=torch.bool)
    for n in range(1, k + 1):
        keep, _ = ops.greedy_diverse(fan(), valid, torch.tensor([n]), torch.tensor([1]), objective)
        assert keep[0].tolist() == sorted(want[:n])
    assert naive(fan()[0].tolist(), 1, k, objective) == want


@pytest.mark.parametrize("objective", OBJECTIVES)
@given(data=st.data())
def test_ragged_groups_equal_the_loop(objective: str, data: st.DataObject) -> None:
    sizes = data.draw(st.lists(st.integers(1, 17), min_size=1, max_size=4))
    width = max(sizes) + data.draw(st.integers(0, 3))
    draw = torch.Generator().manual_seed(data.draw(st.integers(0, 999)))
    filler = data.draw(st.sampled_from([0.0, 1e9, math.nan]))
    features = torch.full((len(sizes), width, 5), filler)
    scores = torch.full((len(sizes), width), filler)
    valid = torch.zeros(len(sizes), width, dtype=torch.bool)
    for g, n in enumerate(sizes):
        place = torch.randperm(width, generator=draw)[:n].sort().values
        valid[g, place] = True
        features[g, place] = torch.randn(n, 5, generator=draw)
        scores[g, place] = torch.randn(n, generator=draw)
    counts = torch.tensor([data.draw(st.integers(0, n)) for n in sizes])
    got = SELECTORS[objective](tokens_of(features, valid), scores, counts)
    for g, k in enumerate(counts.tolist()):
        place = valid[g].nonzero()[:, 0]
        pivot = int(scores[g, place].argmax())
        want = naive(features[g, place].double().tolist(), pivot, k, objective)[:k]
        assert got.keep[g, got.valid[g]].tolist() == sorted(place[want].tolist())


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_zero_vectors_and_copies_are_ties_for_the_lowest_index(objective: Any) -> None:
    x = torch.zeros(1, 7, 3)
    x[0, 2] = torch.tensor([1.0, 0, 0])
    x[0, [4, 6]] = torch.tensor([-1.0, 0, 0])
    keep, _ = ops.greedy_diverse(
        x, torch.ones(1, 7).bool(), torch.tensor([3]), torch.tensor([2]), objective
    )
    # opposite the pivot first, the lower copy of it; then a zero vector
    assert keep[0].tolist() == [0, 2, 4]


@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize("n", [7, 35, 63])
@pytest.mark.parametrize("dim", [3, 33, 129])
def test_still_frames_tie_exactly_wherever_they_stand(objective: Any, n: int, dim: int) -> None:
    frame = torch.randn(1, n, dim, generator=torch.Generator().manual_seed(n))
    video = frame.repeat(1, 3, 1)
    one, three = (
        ops.greedy_diverse(
            x, torch.ones(x.shape[:2]).bool(), torch.tensor([n]), torch.tensor([1]), objective
        )[0]
        for x in (frame, video)
    )
    assert one[0].tolist() == list(range(n))
    if objective == "k_center":  # a copy is as near as can be: all of one frame comes first
        assert torch.equal(one, three)
    keep, _ = ops.greedy_diverse(
        video, torch.ones(1, 3 * n).bool(), torch.tensor([3]), torch.tensor([1]), objective
    )
    kept = set(keep[0].tolist())
    assert all(copy in kept for i in kept for copy in range(i % n, i, n)), kept


def test_pivot_ties_go_to_the_lowest_index() -> None:
    scores = torch.tensor([[0.0, 2.0, 2.0, 1.0, 0.0, 0.0]])
    valid = torch.ones(1, 6, dtype=torch.bool)
    assert MaxSum()(tokens_of(fan(), valid), scores, torch.tensor([1])).keep.tolist() == [[1]]


@pytest.mark.parametrize("selector", list(SELECTORS.values()), ids=OBJECTIVES)
def test_nan_is_refused(selector: Any) -> None:
    valid = torch.ones(1, 6, dtype=torch.bool)
    features, scores, counts = fan(), torch.zeros(1, 6), torch.tensor([2])
    features[0, 3, 1] = math.nan
    with pytest.raises(vtc.VtcError, match=rf"^{selector.name} got NaN features, expected"):
        selector(tokens_of(features, valid), scores, counts)
    scores[0, 1] = math.nan
    with pytest.raises(vtc.VtcError, match=rf"^{selector.name} got NaN scores, expected"):
        selector(tokens_of(fan(), valid), scores, counts)
    with pytest.raises(vtc.VtcError, match=rf"^{selector.name} got scores of shape None"):
        selector(tokens_of(fan(), valid), None, counts)


def test_an_empty_call_is_no_call() -> None:
    tokens = tokens_of(torch.zeros(0, 3, 2), torch.zeros(0, 3).bool())
    got = MaxSum()(tokens, torch.zeros(0, 3), torch.zeros(0, dtype=torch.int64))
    assert got.keep.shape == (0, 0)
