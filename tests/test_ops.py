"""The reference operations against their plainest statement, on ugly shapes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.overrides import TorchFunctionMode

from vtc import ops
from vtc.types import Selection


@pytest.mark.parametrize("n", [1, 63, 217, 577])
@pytest.mark.parametrize("rows", [1, 3])
def test_attention_rows_are_rows_of_full_attention(n: int, rows: int) -> None:
    g = torch.Generator().manual_seed(n)
    q, k = torch.randn(2, 3, n, 32, generator=g), torch.randn(2, 3, n, 32, generator=g)
    rows = min(rows, n)
    full = (q @ k.transpose(-1, -2) * 0.2).softmax(-1).mean(1)[:, :rows]
    torch.testing.assert_close(
        ops.attention_rows(q[:, :, :rows], k, 0.2), full, atol=1e-6, rtol=1e-5
    )


def test_attention_rows_over_valid_keys_equal_those_without_the_rest() -> None:
    g = torch.Generator().manual_seed(0)
    q, k = torch.randn(1, 2, 1, 32, generator=g), torch.randn(1, 2, 9, 32, generator=g)
    valid = torch.tensor([[True, False, True, True, False, True, True, True, False]])
    got = ops.attention_rows(q, k, 0.3, valid)
    assert (got[~valid[:, None]] == 0).all()
    torch.testing.assert_close(
        got[valid[:, None]], ops.attention_rows(q, k[:, :, valid[0]], 0.3).flatten()
    )


def test_attention_rows_in_low_precision_are_as_good_as_plain_torch() -> None:
    g = torch.Generator().manual_seed(1)
    q, k = torch.randn(2, 4, 1, 64, generator=g), torch.randn(2, 4, 217, 64, generator=g)
    low_q, low_k = q.bfloat16(), k.bfloat16()
    truth = (low_q.float() @ low_k.float().mT / 8).softmax(-1).mean(1)
    plain = (low_q @ low_k.mT / 8).softmax(-1).mean(1).float()
    assert (ops.attention_rows(low_q, low_k, 1 / 8) - truth).abs().max() <= 2 * (
        plain - truth
    ).abs().max()


def qkv(rows: int, n: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    g = torch.Generator().manual_seed(seed)
    return torch.randn(rows, 3, n, 8, generator=g), torch.randn(rows, 3, n, 8, generator=g)


def full_attention(q: torch.Tensor, k: torch.Tensor, scale: float) -> torch.Tensor:
    return (q @ k.mT * scale).softmax(-1).mean(-3)


@pytest.mark.parametrize("filler", [0.0, 1e9, float("nan")])
@pytest.mark.parametrize("part", [1, 4, 10**6])
def test_rows_that_stand_in_for_cls(
    monkeypatch: pytest.MonkeyPatch, filler: float, part: int
) -> None:
    monkeypatch.setattr(ops, "_MAP", part * 3 * 3 * 17)
    q, k = qkv(3, 17)
    valid = torch.rand(3, 17, generator=torch.Generator().manual_seed(2)) < 0.6
    valid[1], valid[2] = True, False
    for x in (q, k):
        x.masked_fill_(~valid[:, None, :, None], filler)
    mean, received = (f(q, k, 0.4, valid) for f in (ops.mean_query_row, ops.attention_received))
    for row in (mean, received):
        assert row.dtype == torch.float32
        assert (row[~valid] == 0).all()
        torch.testing.assert_close(row[:2].sum(-1), torch.ones(2))
    for b in range(2):
        at, to = q[b][:, valid[b]], k[b][:, valid[b]]
        alone = full_attention(at.mean(1, keepdim=True), to, 0.4)[0]
        torch.testing.assert_close(mean[b, valid[b]], alone)
        torch.testing.assert_close(received[b, valid[b]], full_attention(at, to, 0.4).mean(0))


@pytest.mark.parametrize("past", [0, 5])
@pytest.mark.parametrize("part", [1, 3, 10**6])
def test_causal_mass_is_read_off_the_full_causal_map(
    monkeypatch: pytest.MonkeyPatch, past: int, part: int
) -> None:
    q, k = qkv(2, 11), qkv(2, 11 + past, 1)[1]
    q = q[0]
    monkeypatch.setattr(ops, "_MAP", part * 3 * (11 + past))
    mask = torch.ones(2, 11).bool()
    mask[0, :3] = False
    g = torch.Generator().manual_seed(3)
    rows, onto = (torch.rand(2, 11, generator=g) < 0.5) & mask, torch.zeros(2, 11).bool()
    onto[0, 4:7], onto[1, 2:5] = True, True
    rows[:, -1] = True
    got = ops.causal_mass(q, k, 0.4, mask, rows, onto)
    for b in range(2):
        allowed = torch.ones(11, 11).tril().bool() & mask[b]
        allowed = torch.cat([torch.ones(11, past).bool(), allowed], -1)
        logits = (q[b] @ k[b].mT * 0.4).masked_fill(~allowed, float("-inf"))
        weights = logits.softmax(-1).mean(0)[rows[b]][:, past:][:, onto[b]]
        torch.testing.assert_close(got[b], weights.sum(-1).mean())


def test_causal_mass_onto_what_comes_later_is_nothing() -> None:
    q, k = qkv(1, 9)
    first = torch.arange(9)[None] < 4
    every = torch.ones(1, 9).bool()
    assert ops.causal_mass(q, k, 1.0, every, first, ~first).tolist() == [0.0]
    assert ops.causal_mass(q, k, 1.0, every, first & False, first).tolist() == [0.0]
    torch.testing.assert_close(ops.causal_mass(q, k, 1.0, every, ~first, every), torch.ones(1))


@given(st.data())
def test_topk_keeps_the_highest_ascending_ties_to_the_lowest(data: st.DataObject) -> None:
    groups, n = data.draw(st.integers(1, 4)), data.draw(st.integers(1, 24))
    # few distinct values, so that ties are common, and -inf among them
    values = st.sampled_from([-float("inf"), -1.0, 0.0, 0.5, 2.0])
    scores = torch.tensor(
        [data.draw(st.lists(values, min_size=n, max_size=n)) for _ in range(groups)]
    )
    valid = torch.tensor(
        [data.draw(st.lists(st.booleans(), min_size=n, max_size=n)) for _ in range(groups)]
    )
    counts = torch.tensor([data.draw(st.integers(0, int(v.sum()))) for v in valid])
    keep, keep_valid = ops.group_topk(scores, valid, counts)
    for g in range(groups):
        ranked = sorted(
            (i for i in range(n) if valid[g, i]), key=lambda i: (-scores[g, i].item(), i)
        )
        assert keep[g, keep_valid[g]].tolist() == sorted(ranked[: counts[g]])
        assert keep_valid[g].sum() == counts[g]


def test_what_stands_in_invalid_slots_does_not_matter() -> None:
    valid = torch.tensor([[True, False, True, False, True]])
    for filler in (0.0, float("inf"), float("nan")):
        scores = torch.tensor([[1.0, filler, 3.0, filler, 2.0]])
        keep, _ = ops.group_topk(scores, valid, torch.tensor([2]))
        assert keep.tolist() == [[2, 4]]


@pytest.mark.parametrize("shape", [(), (3,), (2, 5)])
def test_compact_gathers_rows_and_zeroes_the_rest(shape: tuple[int, ...]) -> None:
    x = torch.randn(2, 7, *shape)
    x[:, 3] = float("nan")  # never gathered, so it must not leak
    index = torch.tensor([[0, 6, 2], [5, 3, 3]])
    valid = torch.tensor([[True, True, True], [True, False, False]])
    got = ops.compact(x, index, valid)
    assert torch.equal(got[0], x[0, [0, 6, 2]])
    assert torch.equal(got[1, 0], x[1, 5])
    assert (got[1, 1:] == 0).all()


@given(st.data())
def test_map_takes_what_raises_the_determinant_most(data: st.DataObject) -> None:
    g = torch.Generator().manual_seed(data.draw(st.integers(0, 999)))
    groups, n = data.draw(st.integers(1, 3)), data.draw(st.integers(1, 9))
    x = torch.randn(groups, n, 12, generator=g)
    kernel = x @ x.mT
    valid = torch.rand(groups, n, generator=g) < 0.8
    for part in (kernel, kernel.mT):
        part[~valid] = data.draw(st.sampled_from([0.0, 1e9, float("nan")]))
    counts = torch.tensor([data.draw(st.integers(0, int(v.sum()))) for v in valid])
    keep, keep_valid = ops.greedy_map(kernel, valid, counts)
    assert keep.shape == keep_valid.shape == (groups, max(counts))
    for i in range(groups):
        chosen: list[int] = []
        while len(chosen) < counts[i]:
            left = [j for j in valid[i].nonzero()[:, 0].tolist() if j not in chosen]
            volume = [kernel[i][s][:, s].double().det() for s in ([*chosen, j] for j in left)]
            chosen.append(left[int(torch.stack(volume).argmax())])
        assert keep[i, keep_valid[i]].tolist() == sorted(chosen)
        assert (keep[i, ~keep_valid[i]] == 0).all()


class Rounding(TorchFunctionMode):
    """Within it operations round as they may elsewhere: in float64, or with the terms of a row
    summed in blocks, or in an order that is another for each row (CUDA's depends on where a row
    starts in memory)."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.how = how

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        if func is torch.Tensor.float and self.how == "float64":
            return args[0].double()
        if func is torch.Tensor.sum and args[1:] == (-1,) and args[0].is_floating_point():
            x = args[0]
            rows, terms = torch.arange(x.shape[-2])[:, None], torch.arange(x.shape[-1])
            if self.how == "rows":
                turned = (terms + 37 * rows) % max(len(terms), 1)
                return x.gather(-1, turned.expand_as(x)).sum(-1)
            if self.how == "blocks":
                return sum((part.sum(-1) for part in x.split(16, -1)), torch.zeros(x.shape[:-1]))
        return func(*args, **(kwargs or {}))


def kept_by_map(kernel: torch.Tensor, k: int) -> list[int]:
    """Tokens of one group; the same however sums are rounded."""
    args = kernel[None], torch.ones(1, len(kernel)).bool(), torch.tensor([k])
    keep = ops.greedy_map(*args)[0]
    for how in ("float64", "blocks", "rows"):
        with Rounding(how):
            assert torch.equal(ops.greedy_map(*args)[0], keep), how
    return keep[0].tolist()  # type: ignore[no-any-return]


def likenesses(n: int, dim: int, seed: int) -> torch.Tensor:
    """CDPruner's kernel of n tokens that share a lot: relevance · cosine · relevance."""
    g = torch.Generator().manual_seed(seed)
    x = torch.nn.functional.normalize(torch.randn(n, dim, generator=g) + 0.5, dim=-1)
    relevance = torch.rand(n, generator=g) + 0.1
    return relevance[:, None] * (x @ x.mT) * relevance


# what the order of summation makes of products that are equal otherwise
@pytest.mark.parametrize("noise", [0.0, 2.0**-21])
@pytest.mark.parametrize(("n", "dim"), [(5, 8), (63, 90), (193, 256)])
def test_map_takes_the_first_of_copies_however_sums_are_rounded(
    n: int, dim: int, noise: float
) -> None:
    g = torch.Generator().manual_seed(n)
    which = torch.cat([torch.randint(n, (2 * n,), generator=g), torch.arange(n)])
    off = noise * (2 * torch.rand(3 * n, 3 * n, generator=g) - 1)
    kernel = likenesses(n, dim, n)[which][:, which] * (1 + off + off.mT)
    firsts = [which.tolist().index(token) for token in range(n)]
    assert set(kept_by_map(kernel, n // 2)) < set(firsts)
    assert kept_by_map(kernel, n) == sorted(firsts)
    # then nothing is left of any, and the lowest that is not taken is next
    rest = sorted(set(range(3 * n)) - set(firsts))
    for more in (1, 4):
        assert kept_by_map(kernel, n + more) == sorted(firsts + rest[:more])


@pytest.mark.parametrize("rank", [3, 24, 130])
def test_map_beyond_the_rank_takes_the_lowest_however_sums_are_rounded(rank: int) -> None:
    kernel = likenesses(2 * rank + 9, rank, rank)
    spanning = kept_by_map(kernel, rank)
    rest = sorted(set(range(len(kernel))) - set(spanning))
    for more in (1, rank):
        assert kept_by_map(kernel, rank + more) == sorted(spanning + rest[:more])


@pytest.mark.parametrize("n", [5, 31, 63])
def test_map_of_copies_and_zeros_is_decided_by_index(n: int) -> None:
    x = torch.randn(n, 90, generator=torch.Generator().manual_seed(n))
    x = torch.cat([x, torch.zeros(2, 90), x, x])
    # one of each; then nothing is left of any, those of zeros included
    assert kept_by_map(x @ x.mT, n + 4) == list(range(n + 4))
    assert kept_by_map(torch.eye(n).repeat(3, 3), n + 2) == list(range(n + 2))


def test_map_prefers_the_larger_of_two_in_one_direction() -> None:
    larger = 1 + 2.0**-16  # beyond what rounding makes of copies
    x = torch.tensor([[1.0, 0], [larger, 0], [0, 0.5], [0, 0.5 * larger]])
    assert kept_by_map(x @ x.mT, 2) == [1, 3]


@given(st.lists(st.lists(st.booleans(), min_size=9, max_size=9), min_size=1), st.integers(0, 12))
def test_marks_are_packed_against_the_right_edge(rows: list[list[bool]], width: int) -> None:
    index, valid = ops.packed_index(torch.tensor(rows), width)
    assert index.shape == valid.shape == (len(rows), width)
    for b, row in enumerate(rows):
        last = [i for i, used in enumerate(row) if used][-width:] if width else []
        assert index[b].tolist() == [0] * (width - len(last)) + last
        assert valid[b].tolist() == [False] * (width - len(last)) + [True] * len(last)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(), (5,), (2, 3)])
def test_merging_sums_what_a_loop_over_pairs_does(
    shape: tuple[int, ...], dtype: torch.dtype
) -> None:
    g = torch.Generator().manual_seed(len(shape))
    x = torch.randn(2, 7, *shape, generator=g).to(dtype)
    slot, token = (torch.randint(n, (2, 12), generator=g) for n in (3, 7))
    weight = torch.randn(2, 12, generator=g) * (torch.rand(2, 12, generator=g) < 0.7)
    x[:, 2] = float("nan")  # named by padding alone, so it must not leak
    weight = weight.masked_fill(token == 2, 0)
    want = torch.zeros(2, 4, *shape)
    for i in range(2):
        for s, t, w in zip(slot[i], token[i], weight[i], strict=True):
            if w != 0:
                want[i, s] += w * x[i, t].float()
    got = ops.group_merge(x, slot, token, weight, 4)
    assert got.dtype == dtype
    torch.testing.assert_close(got, want.to(dtype))
    assert (got[:, 3] == 0).all()


def test_merging_is_what_a_selection_applies() -> None:
    x = torch.randn(1, 6, 5)
    triple = (torch.tensor([[0, 0, 1, 2]]), torch.tensor([[1, 4, 2, 3]]), torch.rand(1, 4) + 0.1)
    slots = torch.arange(3)[None]
    chosen = Selection(
        slots, slots >= 0, (6,), torch.zeros(1, 2).long(), ((1, 2, 3),), merge=triple
    )
    assert torch.equal(chosen.apply(x), ops.group_merge(x, *triple, 3))
