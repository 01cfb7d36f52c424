"""Kernels that choose tokens, interpreted: the same indices as the references in `vtc.ops`."""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType
from typing import Any, Literal, cast

import pytest
import torch
from torch import Tensor

from vtc import ops
from vtc.dispatch import using
from vtc.errors import OptionError

Kernels = Callable[[str], ModuleType]
Objective = Literal["max_sum", "k_center"]
OBJECTIVES: list[Objective] = ["max_sum", "k_center"]
SIZES = [1, 63, 217, 431, 577, 2880]


def same(kernels: Kernels, name: str, *args: Any) -> Tensor:
    """What the kernel keeps, after a comparison with the reference in every cell."""
    got = getattr(kernels(name), name)(*args)
    want = getattr(ops, name).reference(*args)
    for one, other in zip(got, want, strict=True):
        assert one.dtype == other.dtype
        assert one.shape == other.shape
        assert torch.equal(one, other)
    return cast(Tensor, got[0])


def ragged(n: int, g: torch.Generator, groups: int = 5) -> tuple[Tensor, Tensor]:
    """Groups of which the first keeps all its tokens, the second has one, others keep a third, none
    and one."""
    valid = torch.rand(5, n, generator=g) < 0.7
    valid[0, n // 2], valid[1], valid[1, n - 1] = True, False, True
    sizes = valid.sum(-1)
    counts = torch.stack([sizes[0], sizes[1], sizes[2] // 3, sizes[3] * 0, sizes[4].clamp_max(1)])
    return valid[:groups], counts[:groups]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("n", SIZES)
def test_topk_of_ragged_groups(interpreted: Kernels, n: int, dtype: torch.dtype) -> None:
    g = torch.Generator().manual_seed(n)
    valid, counts = ragged(n, g)
    # a third of the scores are ties, and -inf is one of them
    scores = torch.randn(5, n, generator=g)
    scores = torch.where(torch.rand(5, n, generator=g) < 0.3, scores.round(), scores)
    scores[torch.rand(5, n, generator=g) < 0.2] = float("-inf")
    same(interpreted, "group_topk", scores.to(dtype), valid, counts)


@pytest.mark.parametrize("n", SIZES)
def test_topk_keeps_the_highest(interpreted: Kernels, n: int) -> None:
    scores = torch.rand(3, n, generator=torch.Generator().manual_seed(n))
    counts = torch.tensor([n, n // 2, 1])
    keep, there = interpreted("group_topk").group_topk(scores, torch.ones(3, n).bool(), counts)
    for g, k in enumerate(counts.tolist()):
        dropped = scores[g].index_fill(0, keep[g, there[g]], float("-inf"))
        assert there[g].sum() == k
        assert k in (0, n) or scores[g, keep[g, there[g]]].min() >= dropped.max()


@pytest.mark.parametrize("score", [0.0, -2.5, float("inf"), float("-inf")])
def test_topk_of_equal_scores_keeps_the_first(interpreted: Kernels, score: float) -> None:
    valid = torch.arange(2 * 217).view(2, 217) % 3 != 0
    keep = same(
        interpreted, "group_topk", torch.full((2, 217), score), valid, torch.tensor([100, 7])
    )
    assert torch.equal(keep[0], valid[0].nonzero()[:100, 0])


@pytest.mark.parametrize("seed", range(8))
def test_topk_orders_any_numbers_there_are(interpreted: Kernels, seed: int) -> None:
    g = torch.Generator().manual_seed(seed)
    bits = torch.randint(-(2**31), 2**31, (2, 431), generator=g).to(torch.int32)
    scores = bits.view(torch.float32)  # denormal numbers, infinities and NaN of both signs
    scores[:, ::7] = torch.tensor([0.0, -0.0, float("nan"), 1e-45, -1e-45, float("inf")])[seed % 6]
    scores[:, 1::7] = -0.0
    scores[:, 2::7] = 0.0
    valid = torch.rand(2, 431, generator=g) < 0.9
    k = torch.randint(1, 300, (2,), generator=g)
    same(interpreted, "group_topk", scores, valid, k)


@pytest.mark.parametrize("name", ["group_topk", "greedy_diverse", "greedy_map"])
def test_a_group_alone_is_as_in_a_batch(interpreted: Kernels, name: str) -> None:
    args = arguments(name)
    keep, valid = getattr(interpreted(name), name)(*args)
    for g, k in enumerate(args[2].tolist()):
        alone = [x[g : g + 1] if isinstance(x, Tensor) else x for x in args]
        got, there = getattr(interpreted(name), name)(*alone)
        assert torch.equal(got[0], keep[g, :k])
        assert there.all()
        assert not valid[g, k:].any()


def arguments(name: str, groups: int = 3, n: int = 63) -> tuple[Any, ...]:
    g = torch.Generator().manual_seed(groups)
    valid = torch.rand(groups, n, generator=g) < 0.8
    counts = torch.tensor([2 + 3 * i for i in range(groups)], dtype=torch.int64)
    x = torch.randn(groups, n, 6, generator=g)
    if name == "group_topk":
        return x[..., 0], valid, counts
    if name == "greedy_map":
        return kernel_of(x, torch.rand(groups, n, generator=g)), valid, counts
    return x, valid, counts, valid.int().argmax(-1), "k_center"


@pytest.mark.parametrize("name", ["group_topk", "greedy_diverse", "greedy_map"])
def test_strides_do_not_matter(interpreted: Kernels, name: str) -> None:
    values, valid, *rest = arguments(name)
    spread = torch.stack([values, torch.full_like(values, float("nan"))], 1)[:, 0]
    last = torch.stack([values, torch.full_like(values, float("nan"))], -1)[..., 0]
    turned = values.transpose(0, -1).contiguous().transpose(0, -1)
    mask = torch.stack([valid, ~valid], -1)[..., 0]
    for x in (spread, last, turned):
        assert not x.is_contiguous()
        got = same(interpreted, name, x, mask, *rest)
        assert torch.equal(got, same(interpreted, name, values, valid, *rest))


@pytest.mark.parametrize("name", ["group_topk", "greedy_diverse", "greedy_map"])
@pytest.mark.parametrize("groups", [0, 2])
def test_nothing_to_keep(interpreted: Kernels, name: str, groups: int) -> None:
    values, valid, _, *rest = arguments(name, groups)
    nothing = torch.zeros(groups, dtype=torch.int64)
    assert same(interpreted, name, values, valid, nothing, *rest).shape == (groups, 0)


@pytest.mark.parametrize("name", ["group_topk", "greedy_diverse", "greedy_map"])
def test_kernels_are_taken_where_they_are_asked_for(interpreted: Kernels, name: str) -> None:
    args, ran = arguments(name), dict[str, str]()
    with using("triton", ran):
        keep, _ = getattr(ops, name)(*args)
    assert ran == {name: "triton"}
    assert torch.equal(keep, getattr(ops, name).reference(*args)[0])
    many = [x.expand(*x.shape[:1], 16385, *x.shape[2:]) for x in (args[0][:, :1], args[1][:, :1])]
    with using("triton"), pytest.raises(OptionError, match=rf"{name} has no kernel for 16385 tok"):
        getattr(ops, name)(*many, *args[2:])


def test_inner_products_beyond_the_scratch_memory_are_refused(interpreted: Kernels) -> None:
    _, _, counts, pivot, objective = arguments("greedy_diverse")
    refusal = interpreted("greedy_diverse").refusal
    features, valid = torch.empty(5, 16384, 4, device="meta"), torch.ones(5, 16384, device="meta")
    assert refusal(features[:4], valid[:4], counts, pivot.to("meta"), objective) is None
    reason = refusal(features, valid, counts, pivot.to("meta"), objective)
    assert reason == "5.0 GiB of inner products (at most 4)"
    assert "float64" in refusal(features.double(), valid, counts, pivot.to("meta"), objective)
    assert "cpu" in refusal(features, valid, counts, pivot, objective)


@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize(("n", "most"), [(1, 1), (63, 63), (217, 60), (431, 20), (577, 40)])
def test_diverse_ragged_groups(
    interpreted: Kernels, n: int, most: int, objective: Objective
) -> None:
    g = torch.Generator().manual_seed(n)
    valid, counts = ragged(n, g, groups=5 if n < 400 else 2)
    features = torch.randn(len(valid), n, 7, generator=g)
    features[~valid] = float("nan")
    pivot = torch.where(valid, torch.rand(valid.shape, generator=g), -1).argmax(-1)
    same(interpreted, "greedy_diverse", features, valid, counts.clamp_max(most), pivot, objective)


@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("dim", [0, 2, 33, 160])
def test_diverse_in_low_precision_and_any_width(
    interpreted: Kernels, dim: int, dtype: torch.dtype, objective: Objective
) -> None:
    g = torch.Generator().manual_seed(dim)
    features = torch.randn(2, 70, dim, generator=g).to(dtype)
    valid, counts = torch.ones(2, 70).bool(), torch.tensor([20, 11])
    same(interpreted, "greedy_diverse", features, valid, counts, torch.tensor([69, 3]), objective)


@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize("seed", range(10))
def test_diverse_small_groups(interpreted: Kernels, seed: int, objective: Objective) -> None:
    g = torch.Generator().manual_seed(seed)
    groups, n, dim = (int(torch.randint(1, most, (), generator=g)) for most in (5, 30, 9))
    valid = torch.rand(groups, n, generator=g) < 0.7
    valid[:, int(torch.randint(n, (), generator=g))] = True
    counts = (torch.rand(groups, generator=g) * (valid.sum(-1) + 1)).long()
    features = torch.randn(groups, n, dim, generator=g)
    pivot = torch.where(valid, torch.rand(groups, n, generator=g), -1).argmax(-1)
    same(interpreted, "greedy_diverse", features, valid, counts, pivot, objective)


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_diverse_tokens_of_zeros_and_opposites(interpreted: Kernels, objective: Objective) -> None:
    x = torch.zeros(1, 7, 3)
    x[0, 2] = torch.tensor([1.0, 0, 0])
    x[0, [4, 6]] = torch.tensor([-1.0, 0, 0])
    args = torch.ones(1, 7).bool(), torch.tensor([3]), torch.tensor([2]), objective
    # opposite the pivot first, the lower copy of it; then a token of zeros
    assert same(interpreted, "greedy_diverse", x, *args)[0].tolist() == [0, 2, 4]
    every = same(interpreted, "greedy_diverse", torch.zeros(1, 7, 3), *args)
    assert every[0].tolist() == [0, 1, 2]


@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize(("n", "dim"), [(7, 3), (35, 129), (63, 33)])
def test_diverse_still_frames_tie_exactly(
    interpreted: Kernels, n: int, dim: int, objective: Objective
) -> None:
    frame = torch.randn(1, n, dim, generator=torch.Generator().manual_seed(n))
    valid, pivot = torch.ones(1, 3 * n).bool(), torch.tensor([1])
    video = frame.repeat(1, 3, 1)
    same(interpreted, "greedy_diverse", video, valid, torch.tensor([n]), pivot, objective)
    # as many as one frame has, farthest first: a copy is as near as can be, so one frame it is
    if objective == "k_center":
        keep, _ = interpreted("greedy_diverse").greedy_diverse(
            video, valid, torch.tensor([n]), pivot, objective
        )
        assert keep[0].tolist() == list(range(n))


def kernel_of(x: Tensor, relevance: Tensor) -> Tensor:
    """CDPruner's kernel: diag(relevance) · cosine · diag(relevance)."""
    x = torch.nn.functional.normalize(x, dim=-1) * relevance[..., None]
    return (x[:, :, None] * x[:, None]).sum(-1)


@pytest.mark.parametrize(
    ("n", "dim", "most"), [(1, 3, 1), (63, 96, 63), (217, 64, 30), (431, 96, 20), (577, 64, 20)]
)
def test_map_ragged_groups(interpreted: Kernels, n: int, dim: int, most: int) -> None:
    g = torch.Generator().manual_seed(n)
    valid, counts = ragged(n, g)
    kernel = kernel_of(torch.randn(5, n, dim, generator=g), torch.rand(5, n, generator=g) + 0.01)
    kernel[~valid] = float("nan")
    kernel.mT[~valid] = float("nan")
    same(interpreted, "greedy_map", kernel, valid, counts.clamp_max(most))


@pytest.mark.parametrize("seed", range(8))
def test_map_small_groups_beyond_their_rank(interpreted: Kernels, seed: int) -> None:
    g = torch.Generator().manual_seed(seed)
    groups, n, dim = (int(torch.randint(1, most, (), generator=g)) for most in (5, 30, 9))
    valid = torch.rand(groups, n, generator=g) < 0.7
    kernel = kernel_of(torch.randn(groups, n, dim, generator=g), torch.rand(groups, n, generator=g))
    same(interpreted, "greedy_map", kernel, valid, valid.sum(-1))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_map_in_other_precisions(interpreted: Kernels, dtype: torch.dtype) -> None:
    kernel, valid, counts = arguments("greedy_map")
    same(interpreted, "greedy_map", kernel.to(dtype), valid, counts)


@pytest.mark.parametrize("noise", [0.0, 2.0**-21])
@pytest.mark.parametrize("n", [7, 35])
def test_map_keeps_the_first_of_copies_until_all_are_told(
    interpreted: Kernels, n: int, noise: float
) -> None:
    g = torch.Generator().manual_seed(n)
    which = torch.cat([torch.randint(n, (2 * n,), generator=g), torch.arange(n)])
    firsts = [which.tolist().index(token) for token in range(n)]
    rest = sorted(set(range(3 * n)) - set(firsts))
    x, relevance = torch.randn(1, n, 100, generator=g), torch.rand(1, n, generator=g) + 0.1
    # noise: what the order of summation may make of equal products
    off = noise * (2 * torch.rand(3 * n, 3 * n, generator=g) - 1)
    kernel = kernel_of(x, relevance)[:, which][..., which] * (1 + off + off.mT)
    valid = torch.ones(1, 3 * n).bool()
    for k, want in [(n, firsts), (n + 3, firsts + rest[:3]), (3 * n, firsts + rest)]:
        keep = same(interpreted, "greedy_map", kernel, valid, torch.tensor([k]))
        assert keep[0].tolist() == sorted(want)


def test_map_of_a_diagonal_is_topk(interpreted: Kernels) -> None:
    g = torch.Generator().manual_seed(0)
    diagonal = (torch.rand(2, 63, generator=g) * 8).round() / 8  # with ties and zeros
    valid, counts = torch.rand(2, 63, generator=g) < 0.8, torch.tensor([40, 3])
    keep = same(interpreted, "greedy_map", diagonal.diag_embed(), valid, counts)
    assert torch.equal(keep, same(interpreted, "group_topk", diagonal, valid, counts))
