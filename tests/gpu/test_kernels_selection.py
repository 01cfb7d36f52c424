"""On a CUDA device, the kernels that choose, gather and merge tokens against the references."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, Literal

import pytest
import torch
from torch import Tensor

from tests.kernels.conftest import Poisoned
from vtc import ops
from vtc.dispatch import using

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
Objective = Literal["max_sum", "k_center"]
OBJECTIVES: list[Objective] = ["max_sum", "k_center"]


def kernel(name: str, *args: Any) -> tuple[Tensor, ...]:
    """What the kernel gives, into memory that is never clean by chance."""
    ran = dict[str, str]()
    with Poisoned(), using("triton", ran):
        out = getattr(ops, name)(*args)
    assert ran == {name: "triton"}
    return out if isinstance(out, tuple) else (out,)


def same(name: str, *args: Any) -> Tensor:
    """What the kernel gives first, after a comparison with the reference in every cell."""
    got, want = kernel(name, *args), getattr(ops, name).reference(*args)
    for one, other in zip(got, want if isinstance(want, tuple) else (want,), strict=True):
        assert one.dtype == other.dtype
        assert one.shape == other.shape
        assert torch.equal(one, other)
    return got[0]


def random(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to("cuda", dtype)


def integers(end: int, *shape: int, seed: int = 0) -> Tensor:
    return torch.randint(end, shape, generator=torch.Generator().manual_seed(seed)).cuda()


def everything(groups: int, n: int) -> Tensor:
    return torch.ones(groups, n, dtype=torch.bool, device="cuda")


def ragged(n: int) -> tuple[Tensor, Tensor]:
    """Masks of three groups and how many there are in each: all, one, some."""
    valid = torch.rand(3, n, generator=torch.Generator().manual_seed(n)) < 0.8
    valid[0] = True
    valid[1], valid[1, n // 2] = False, True
    return valid.cuda(), valid.sum(-1)


def replay(features: Tensor, valid: Tensor, keep: Tensor, pivot: int, objective: Objective) -> None:
    """Check that one group's tokens can be chosen one after another, each least like those before.

    In float64, and up to near-ties: the likeness of a choice may be above the least by 2 eps of
    float32 for each cosine in it, and as rounding makes of its D terms, √D times that.
    """
    x = features.double().masked_fill(~valid[:, None], 0)
    x = x / x.norm(dim=-1, keepdim=True).clamp_min(1e-12)
    cosine = x @ x.mT
    near = 2 * torch.finfo(torch.float32).eps * math.sqrt(features.shape[1])
    likeness = torch.full_like(cosine[0], 0 if objective == "max_sum" else -math.inf)
    left, mine = valid.clone(), torch.zeros_like(valid).index_fill(0, keep, True)
    assert bool(mine[pivot])
    last, least = torch.tensor(pivot, device=keep.device), []
    for i in range(1, len(keep)):
        left[last] = mine[last] = False
        row = cosine[last]
        likeness = likeness + row if objective == "max_sum" else torch.maximum(likeness, row)
        last = likeness.masked_fill(~mine, math.inf).argmin()
        best = likeness.masked_fill(~left, math.inf).min()
        least.append(likeness[last] - best <= near * (i if objective == "max_sum" else 1))
    assert not least or bool(torch.stack(least).all())


@pytest.mark.parametrize(
    ("n", "dtype"),
    [
        (1, torch.float32),
        (577, torch.float32),
        (577, torch.bfloat16),
        (2880, torch.float32),
        (16384, torch.float32),
    ],
)
def test_topk(n: int, dtype: torch.dtype) -> None:
    scores = random(3, n, seed=n)
    scores = torch.where(random(3, n, seed=1) < 0, scores.round(), scores)  # ties, -0 among them
    scores = scores.masked_fill(random(3, n, seed=2) > 1, float("-inf")).to(dtype)
    valid, counts = ragged(n)
    for k in (counts, counts // 3):
        same("group_topk", scores, valid, k)
        same("group_topk", torch.zeros_like(scores), valid, k)


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_diverse_is_the_reference_in_float32(objective: Objective) -> None:
    valid, counts = ragged(577)
    features = random(3, 577, 256).masked_fill(~valid[..., None], float("nan"))
    pivot = torch.where(valid, random(3, 577, seed=1), -math.inf).argmax(-1)
    for most in (1, 64):
        same("greedy_diverse", features, valid, counts.clamp_max(most), pivot, objective)
    same("greedy_diverse", features, valid, counts, pivot, objective)


@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize(
    ("n", "dim", "k"), [(577, 1024, 64), (577, 33, 64), (2880, 1024, 640), (16384, 64, 100)]
)
def test_diverse_in_low_precision(n: int, dim: int, k: int, objective: Objective) -> None:
    groups = 1 if n > 2880 else 3
    valid, counts = (part[-groups:] for part in ragged(n))
    features = random(groups, n, dim, dtype=torch.bfloat16)
    features += random(dim, seed=3, dtype=torch.bfloat16)  # as those of models, they share a lot
    pivot = valid.int().argmax(-1)
    args = features, valid, counts.clamp_max(k), pivot, objective
    keep, there = kernel("greedy_diverse", *args)
    for g, count in enumerate(args[2].tolist()):
        mine = keep[g, there[g]]
        assert len(mine) == count
        assert bool((mine.diff() > 0).all()) and bool(valid[g, mine].all())
        assert bool((keep[g, ~there[g]] == 0).all())
        replay(features[g], valid[g], mine, int(pivot[g]), objective)
    assert torch.equal(keep, kernel("greedy_diverse", *args)[0])
    alone = kernel("greedy_diverse", *(x[-1:] for x in args[:4]), objective)[0]
    assert torch.equal(alone[0], keep[-1, there[-1]])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("n", "dim"), [(193, 256), (960, 1024)])
def test_still_frames_tie_exactly(n: int, dim: int, dtype: torch.dtype) -> None:
    video, valid = random(1, n, dim, dtype=dtype).repeat(1, 3, 1), everything(1, 3 * n)
    pivot = torch.tensor([1], device="cuda")
    # a copy is as near as can be, so that as many as a frame has are one frame
    keep, _ = kernel("greedy_diverse", video, valid, torch.tensor([n]), pivot, "k_center")
    assert keep[0].tolist() == list(range(n))
    keep, _ = kernel("greedy_diverse", video, valid, torch.tensor([40]), pivot, "max_sum")
    kept = set(keep[0].tolist())
    assert all(copy in kept for i in kept for copy in range(i % n, i, n)), kept


def dpp(groups: int, n: int, dim: int, seed: int = 0) -> Tensor:
    x = torch.nn.functional.normalize(random(groups, n, dim, seed=seed) + 0.5, dim=-1)
    relevance = random(groups, n, seed=seed + 1).sigmoid()
    return relevance[..., None] * (x @ x.mT) * relevance[:, None]


def test_map() -> None:
    valid, counts = ragged(577)
    kernel_matrix = dpp(3, 577, 768)
    kernel_matrix[~valid] = float("nan")
    for most in (1, 64, 128):
        same("greedy_map", kernel_matrix, valid, counts.clamp_max(most))


# from 128 terms on CUDA sums a row in an order that depends on where the row starts in memory: a
# copy that is a multiple of four rows away rounds as its first does, others do not
@pytest.mark.parametrize("noise", [0.0, 2.0**-21])
@pytest.mark.parametrize("apart", [192, 193])
def test_map_takes_the_first_of_copies(apart: int, noise: float) -> None:
    off = noise * random(3 * apart, 3 * apart, seed=3).clamp(-1, 1)
    copies = dpp(1, apart, 256).repeat(1, 3, 3) * (1 + off + off.mT)
    for k in (apart, apart + 3, 2 * apart + 1):  # beyond them the lowest is next
        keep = same("greedy_map", copies, everything(1, 3 * apart), torch.tensor([k]))
        assert keep[0].tolist() == list(range(k))
    keep = same("greedy_map", copies, everything(1, 3 * apart), torch.tensor([150]))
    assert bool((keep < apart).all())


def test_map_beyond_the_rank_takes_the_lowest() -> None:
    kernel_matrix, valid = dpp(1, 577, 64), everything(1, 577)
    spanning = set(same("greedy_map", kernel_matrix, valid, torch.tensor([64]))[0].tolist())
    rest = sorted(set(range(577)) - spanning)
    keep = same("greedy_map", kernel_matrix, valid, torch.tensor([200]))
    assert set(keep[0].tolist()) == spanning | set(rest[:136])


def test_rows() -> None:
    valid = random(8, 640, seed=5) < 1
    for x in (
        random(8, 700, 4096, dtype=torch.bfloat16),
        random(8, 700, 3, 5),
        integers(9000, 8, 700),
        random(8, 700) > 0,
    ):
        out = same("compact", x, integers(700, 8, 640), valid)
        assert out.is_contiguous()


def test_marks() -> None:
    for n in (577, 9001):
        used = random(3, n, seed=n) > 0
        used[0], used[1] = True, False
        for width in (1, n // 2, n + 3):
            same("packed_index", used, width)


def merging(n: int, dim: int, slots: int, dtype: torch.dtype, seed: int = 0) -> tuple[Any, ...]:
    weight = random(8, n, seed=seed + 1).masked_fill(random(8, n, seed=seed + 2) > 1, 0)
    x = random(8, n, dim, seed=seed, dtype=dtype)
    return x, integers(slots - 2, 8, n, seed=seed), integers(n, 8, n, seed=seed + 3), weight, slots


@pytest.mark.parametrize(
    ("n", "dim", "slots", "dtype"),
    [(576, 4096, 64, torch.bfloat16), (577, 1100, 40, torch.float32)],
)
def test_sums(n: int, dim: int, slots: int, dtype: torch.dtype) -> None:
    args = merging(n, dim, slots, dtype)
    x, slot, token, weight, _ = args
    got, want = kernel("group_merge", *args)[0], ops.group_merge.reference(*args)  # type: ignore[attr-defined]
    share = torch.zeros(8, slots, n, dtype=torch.float64, device="cuda")
    group = torch.arange(8, device="cuda")[:, None].expand_as(slot)
    truth = share.index_put((group, slot, token), weight.double(), accumulate=True) @ x.double()
    assert (got - truth).abs().max() <= 2 * (want - truth).abs().max()
    assert bool((got[:, -2:] == 0).all())
    assert all(torch.equal(got, kernel("group_merge", *args)[0]) for _ in range(3))


def fixed(*counts: int) -> Tensor:
    return torch.tensor(counts)


CALLS: dict[str, Callable[[int], tuple[Any, ...]]] = {
    "group_topk": lambda seed: (random(2, 577, seed=seed), everything(2, 577), fixed(64, 9)),
    "greedy_diverse": lambda seed: (
        random(2, 577, 256, seed=seed, dtype=torch.bfloat16),
        everything(2, 577),
        fixed(64, 9),
        integers(577, 2, seed=seed),
        "max_sum",
    ),
    "greedy_map": lambda seed: (dpp(2, 577, 768, seed), everything(2, 577), fixed(64, 9)),
    "compact": lambda seed: (
        random(8, 700, 4096, seed=seed, dtype=torch.bfloat16),
        integers(700, 8, 640, seed=seed),
        random(8, 640, seed=seed) < 1,
    ),
    "packed_index": lambda seed: (random(2, 577, seed=seed) > 0, 300),
    "group_merge": lambda seed: merging(576, 4096, 64, torch.bfloat16, seed),
}


@pytest.mark.parametrize("name", CALLS)
def test_a_graph_captures_it_and_replays_it_on_other_inputs(name: str) -> None:
    first, second = CALLS[name](0), CALLS[name](10)
    expected = [kernel(name, *first), kernel(name, *second)]  # which warms up
    static = [x.clone() if isinstance(x, Tensor) and x.is_cuda else x for x in first]
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = kernel(name, *static)
    for args, want in zip((second, first), (expected[1], expected[0]), strict=True):
        for here, x in zip(static, args, strict=True):
            if isinstance(x, Tensor) and x.is_cuda:
                here.copy_(x)
        graph.replay()
        assert all(torch.equal(one, other) for one, other in zip(out, want, strict=True))


@pytest.mark.parametrize("name", CALLS)
def test_nothing_waits_for_the_device(name: str) -> None:
    args = CALLS[name](0)
    kernel(name, *args)
    mode = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        kernel(name, *args)
    finally:
        torch.cuda.set_sync_debug_mode(mode)
