"""The shared selectors against plain statements: coverage, determinantal points, windows, and crop
by crop."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace
from fractions import Fraction
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import vtc
from vtc.scorers import Isolation, TextRelevance
from vtc.selectors import ByRow, Coverage, Distinct, DppMap, EvenWindows, TopK
from vtc.selectors.coverage import cosines, greedy_coverage
from vtc.selectors.dpp_map import relevance
from vtc.selectors.windows import quotas, runs, squares, top_in_windows, window_sizes
from vtc.types import Tokens


def tokens_of(features: Tensor, valid: Tensor, **more: Any) -> Tokens:
    grid = more.pop("grid", tuple((1, 1, int(n)) for n in valid.sum(-1)))
    parent = torch.tensor([[g, g] for g in range(len(valid))])
    return Tokens(features, valid, grid, parent, **more)


def drawn(seed: int, *shape: int) -> Tensor:
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed))


def ragged(sizes: list[int], extra: int = 0) -> Tensor:
    return torch.arange(max(sizes) + extra) < torch.tensor(sizes)[:, None]


sizes = st.lists(st.integers(1, 12), min_size=1, max_size=3)


def covering(likeness: list[list[float]], weight: list[float], k: int) -> list[int]:
    """Greedy coverage, in Python floats."""
    chosen: list[int] = []
    for _ in range(k):
        covered = [max([0.0, *(row[c] for c in chosen)]) for row in likeness]
        gains = {
            i: weight[i]
            * sum(max(0.0, row[i] - m) for row, m in zip(likeness, covered, strict=True))
            for i in range(len(weight))
            if i not in chosen
        }
        chosen.append(max(gains, key=lambda i: (gains[i], -i)))
    return sorted(chosen)


@given(sizes=sizes, seed=st.integers(0, 999), weighted=st.booleans(), extra=st.integers(0, 2))
def test_coverage_equals_the_loop(sizes: list[int], seed: int, weighted: bool, extra: int) -> None:
    valid = ragged(sizes, extra)
    g, n = valid.shape
    likeness = (drawn(seed, g, 7, n) - 0.3).masked_fill(~valid[:, None], math.nan)
    weight = drawn(seed + 1, g, n) if weighted else None
    counts = torch.tensor([max(1, size // 2) for size in sizes])
    keep, there = greedy_coverage(likeness, valid, counts, weight)
    for b, size in enumerate(sizes):
        w = [1.0] * size if weight is None else weight[b, :size].double().tolist()
        want = covering(likeness[b, :, :size].double().tolist(), w, int(counts[b]))
        assert keep[b, there[b]].tolist() == want


def test_coverage_by_cosine_is_that_of_the_map() -> None:
    valid = ragged([9, 5])
    x, scores, counts = drawn(3, 2, 9, 4) - 0.5, drawn(4, 2, 9), torch.tensor([4, 2])
    got = Coverage(alpha=2.0)(tokens_of(x, valid), scores, counts)
    likeness = cosines(x, valid)
    keep, there = greedy_coverage(likeness, valid, counts, scores.masked_fill(~valid, 0) ** 2)
    assert torch.equal(got.keep, keep) and torch.equal(got.valid, there)
    assert torch.allclose(likeness[0].diagonal(), torch.ones(9))
    assert (likeness[1, 5:] == 0).all() and (likeness[1, :, 5:] == 0).all()


def without_copies(x: Tensor, order: list[int], wanted: int) -> list[int]:
    """VisPruner's rounds over one list, 8 or as many as are too many at a time."""
    while len(order) > wanted:
        left = x[:, order]
        even, odd = order[::2], order[1::2]
        nearest = (left[:, ::2] @ left[:, 1::2].mT)[0].amax(-1).tolist()
        by_likeness = sorted(range(len(even)), key=lambda i: -nearest[i])
        order = [even[i] for i in by_likeness[min(8, len(order) - wanted) :]] + odd
    return order


@pytest.mark.parametrize("count", [64, 128, 192])
def test_near_copies_of_a_whole_crop_go_as_in_the_loop(count: int) -> None:
    # tokens of cosine .8, as encoders make them: rounding decides who is nearer
    draw = torch.Generator().manual_seed(count)
    x = torch.randn(1, 576, 1024, generator=draw) + 2 * torch.randn(1, 1, 1024, generator=draw)
    scores = torch.rand(1, 576, generator=draw)
    tokens = Tokens(x, torch.ones(1, 576).bool(), ((1, 24, 24),), torch.zeros(1, 2).long())
    order = scores[0].argsort(descending=True, stable=True).tolist()
    unit = torch.nn.functional.normalize(x, dim=-1)
    rest = without_copies(unit, order[count // 2 :], count - count // 2)
    chosen = Distinct()(tokens, scores, torch.tensor([count]))
    assert chosen.keep[0].tolist() == sorted(order[: count // 2] + rest)


@settings(max_examples=20)
@given(n=st.integers(2, 6), seed=st.integers(0, 999))
def test_determinants_grow_most_at_each_choice(n: int, seed: int) -> None:
    """Each choice of `dpp_map` is the best of all in the determinant of the kernel so far."""
    valid = ragged([n])
    x, scores = drawn(seed, 1, n, 8) - 0.5, drawn(seed + 1, 1, n)
    r = relevance(scores, valid)[0].double()
    s = torch.nn.functional.normalize(x[0].double(), dim=-1)
    kernel = r[:, None] * (s @ s.T) * r
    chosen: list[int] = []
    for k in range(1, n):
        got = DppMap()(tokens_of(x, valid), scores, torch.tensor([k])).keep[0].tolist()
        best = {
            i: float(torch.det(kernel[[*chosen, i]][:, [*chosen, i]]))
            for i in set(range(n)) - set(chosen)
        }
        chosen.append(max(best, key=lambda i: (best[i], -i)))
        assert got == sorted(chosen)


def test_the_pair_of_orthogonal_tokens_is_the_best_of_all_pairs() -> None:
    """Where greedy is optimal it equals brute force over all subsets."""
    x = torch.tensor([[[1.0, 0, 0], [0.9, 0.1, 0], [0, 1.0, 0], [0, 0.9, 0.2], [0, 0, 1.0]]])
    s = torch.nn.functional.normalize(x[0], dim=-1)
    kernel = s @ s.T
    best = max(
        itertools.combinations(range(5), 3),
        key=lambda c: float(torch.det(kernel[list(c)][:, list(c)])),
    )
    got = DppMap()(tokens_of(x, ragged([5])), torch.ones(1, 5), torch.tensor([3]))
    assert got.keep[0].tolist() == list(best) == [0, 2, 4]


def test_relevance_lies_between_its_floor_and_one() -> None:
    scores = torch.tensor([[-3.0, 1.0, 0.0], [10.0, 10.0, 99.0]])
    valid = torch.tensor([[True, True, True], [True, True, False]])
    own = relevance(scores, valid)
    assert torch.allclose(own, torch.tensor([[2.5e-7, 1.0, 0.75], [1.0, 1.0, 0.0]]), atol=1e-6)
    both = relevance(scores, valid, together=True)
    want = [[0.0, 4 / 13, 3 / 13], [1.0, 1.0, 0.0]]
    assert torch.allclose(both, torch.tensor(want), atol=1e-6)


@given(data=st.data())
def test_quotas(data: st.DataObject) -> None:
    """They sum to what was asked for, fit, and are largest remainders where nothing is full."""
    room = data.draw(st.lists(st.integers(0, 9), min_size=1, max_size=6))
    weights = data.draw(st.lists(st.integers(0, 20), min_size=len(room), max_size=len(room)))
    total = data.draw(st.integers(0, sum(room)))
    how: Any = data.draw(st.sampled_from(["remainder", "weight"]))
    got = quotas(torch.tensor([total]), torch.tensor([weights]), torch.tensor([room]), how)[0]
    assert int(got.sum()) == total
    assert all(0 <= q <= c for q, c in zip(got.tolist(), room, strict=True))
    if not sum(weights):
        return
    shares = [Fraction(total * w, sum(weights)) for w in weights]
    if any(share > c for share, c in zip(shares, room, strict=True)):
        return
    want = [int(share) for share in shares]
    by = [s - int(s) if how == "remainder" else Fraction(w) for s, w in zip(shares, weights)]  # noqa: B905
    open_ = [i for i in range(len(room)) if want[i] < room[i]]
    for i in sorted(open_, key=lambda i: (-by[i], i))[: total - sum(want)]:
        want[i] += 1
    assert got.tolist() == want


def test_what_does_not_fit_is_dealt_again() -> None:
    room = torch.tensor([[2, 5, 5], [0, 4, 4]])
    weights = torch.tensor([[10.0, 1.0, 3.0], [5.0, 0.0, 0.0]])
    got = quotas(torch.tensor([8, 3]), weights, room)
    # 2 of 2; then 6 by 1:3 = 1.5 and 4.5, the lower window first; then by size: 1.5 and 1.5
    assert got.tolist() == [[2, 2, 4], [0, 2, 1]]


@given(sizes=sizes, seed=st.integers(0, 999), windows=st.integers(1, 4))
def test_the_best_of_each_window(sizes: list[int], seed: int, windows: int) -> None:
    valid = ragged(sizes, 2)
    scores = drawn(seed, *valid.shape).masked_fill(~valid, math.nan)
    window = (drawn(seed + 1, *valid.shape) * windows).long()
    room = window_sizes(window, valid, windows)
    quota = (drawn(seed + 2, *room.shape) * (room + 1)).long()
    mask = top_in_windows(scores, valid, window, quota)
    for g, n in enumerate(sizes):
        for w in range(windows):
            members = [i for i in range(n) if int(window[g, i]) == w]
            assert len(members) == int(room[g, w])
            best = sorted(members, key=lambda i, g=g: (-float(scores[g, i]), i))
            want = set(best[: int(quota[g, w])])
            assert {i for i in members if mask[g, i]} == want
        assert not mask[g, n:].any()


def test_windows_of_a_grid_and_of_a_row() -> None:
    tokens = tokens_of(torch.zeros(1, 24, 1), ragged([24]), grid=((1, 4, 6),))
    assert (
        squares(tokens, 2, 3).view(4, 6).tolist()
        == [[0, 0, 1, 1, 2, 2]] * 2 + [[3, 3, 4, 4, 5, 5]] * 2
    )
    assert runs(tokens, 4)[0].tolist() == [0] * 6 + [1] * 6 + [2] * 6 + [3] * 6
    got = EvenWindows(2, 3)(tokens, torch.arange(24.0)[None], torch.tensor([6]))
    assert got.keep[0].tolist() == [7, 9, 11, 19, 21, 23]


def crops() -> Tokens:
    """A thumbnail of 2×2 and a canvas of two crops of 2×2 side by side."""
    row = torch.tensor([[0] * 4 + [1, 1, 2, 2] * 2])
    return tokens_of(
        drawn(1, 1, 12, 3) - 0.5,
        ragged([12]),
        parts=(((1, 2, 2), (1, 2, 4)),),
        signals={"encoder_row": row, "keys": drawn(2, 1, 12, 5)},
    )


def test_every_crop_decides_by_itself() -> None:
    tokens = crops()
    scores = torch.tensor([[9.0, 8, 7, 6, 1, 4, 3, 2, 0, 5, 2.5, 1.5]])
    got = ByRow(TopK())(tokens, scores, torch.tensor([5]))
    # 5 over crops of 4, 4, 4: 2, 2, 1
    assert got.keep[0].tolist() == [0, 1, 5, 6, 9]
    assert got.valid.all() and got.scores is scores
    alone = replace(tokens, signals={"encoder_row": torch.zeros(1, 12).long()})
    assert ByRow(TopK())(alone, scores, torch.tensor([5])).keep[0].tolist() == [0, 1, 2, 3, 9]


def test_crops_have_their_grids_and_signals() -> None:
    seen: list[Tokens] = []

    class Look(TopK):
        needs = (vtc.Signal("keys", (1,)),)

        def __call__(self, tokens: Tokens, scores: Any, counts: Tensor) -> vtc.Selection:
            seen.append(tokens)
            return super().__call__(tokens, scores, counts)

    tokens = crops()
    ByRow(Look())(tokens, torch.ones(1, 12), torch.tensor([3]))
    (rows,) = seen
    assert rows.grid == ((1, 2, 2),) * 3
    assert torch.equal(rows.signals["keys"][2], tokens.signals["keys"][0, [6, 7, 10, 11]])
    assert rows.parent.tolist() == [[0, 0]] * 3


class Averaging(TopK):
    """The best token, into which the last one is merged, and the mean of all behind it."""

    def __call__(self, tokens: Tokens, scores: Any, counts: Tensor) -> vtc.Selection:
        one = super().__call__(tokens, scores, counts.clamp_max(1))
        n = tokens.valid.shape[1]
        last = tokens.valid.sum(-1, keepdim=True) - 1
        everything = torch.arange(n).expand(len(last), -1)
        lengths = tokens.valid.sum(-1, keepdim=True)
        slot = torch.cat([torch.zeros_like(one.keep), torch.zeros_like(last)], 1)
        slot = torch.cat([slot, torch.ones_like(everything)], 1)
        token = torch.cat([one.keep, last, everything], 1)
        weight = torch.cat([torch.full((len(last), 2), 0.5), tokens.valid / lengths], 1)
        positions = torch.cat([one.keep, last], 1)
        return replace(one, positions=positions, merge=(slot, token, weight))


def test_what_crops_merge_is_merged() -> None:
    tokens = crops()
    scores = torch.tensor([[9.0, 8, 7, 6, 1, 4, 3, 2, 0, 5, 2.5, 1.5]])
    got = ByRow(Averaging())(tokens, scores, torch.tensor([6]))
    x = tokens.features[0]
    want = [
        (x[0] + x[3]) / 2,
        (x[6] + x[11]) / 2,
        (x[9] + x[9]) / 2,
        x[:4].mean(0),
        x[[4, 5, 8, 9]].mean(0),
        x[[6, 7, 10, 11]].mean(0),
    ]
    there = got.slot_positions[0] >= 0
    torch.testing.assert_close(got.apply(tokens.features)[0, there], torch.stack(want))
    assert got.slot_positions[0, there].tolist() == [0, 6, 9, 3, 9, 11]


def test_how_far_a_token_is_from_its_nearest() -> None:
    x = torch.tensor([[[1.0, 0], [0, 1], [1, 1], [math.nan, 0]], [[2, 0], [0, 0], [0, 0], [0, 0]]])
    valid = torch.tensor([[True, True, True, False], [True, False, False, False]])
    got = Isolation()(tokens_of(x, valid))
    near = 1 - 2**-0.5
    torch.testing.assert_close(got[0, :3], torch.tensor([near, near, near]))
    assert got[1, 0] == 2


def test_relevance_to_text_is_the_mean_cosine() -> None:
    x, text = drawn(1, 2, 4, 3) - 0.5, drawn(2, 3, 5, 3) - 0.5
    there = torch.tensor([[True] * 5, [False] * 5, [True, False, True, False, False]])
    tokens = replace(
        tokens_of(x, ragged([4, 2], 0)),
        parent=torch.tensor([[0, 2], [1, 0]]),
        text=text.masked_fill(~there[..., None], math.nan),
        text_valid=there,
    )
    got = TextRelevance()(tokens)
    for g, row in enumerate((2, 0)):
        for i in range((4, 2)[g]):
            each = torch.cosine_similarity(x[g, i], text[row, there[row]], dim=-1)
            torch.testing.assert_close(got[g, i], each.mean())


def test_text_that_was_not_captured_is_an_error() -> None:
    with pytest.raises(vtc.VtcError, match=r"name Signal\('text'\)"):
        TextRelevance()(tokens_of(torch.zeros(1, 2, 3), ragged([2])))


@pytest.mark.parametrize("selector", [Coverage(), DppMap()], ids=lambda s: s.name)
def test_nan_is_refused(selector: Any) -> None:
    x, scores = drawn(1, 1, 3, 2), torch.ones(1, 3)
    x[0, 1, 0] = math.nan
    with pytest.raises(vtc.VtcError, match=rf"^{selector.name} got NaN features, expected"):
        selector(tokens_of(x, ragged([3])), scores, torch.tensor([2]))
    with pytest.raises(vtc.VtcError, match=rf"^{selector.name} got scores of shape None"):
        selector(tokens_of(x, ragged([3])), None, torch.tensor([2]))
