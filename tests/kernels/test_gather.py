"""Kernels that move and sum rows, interpreted, against the references in `vtc.ops`."""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

from vtc import ops
from vtc.dispatch import using
from vtc.errors import OptionError

Kernels = Callable[[str], ModuleType]
SIZES = [1, 63, 217, 431, 577, 2880]
DTYPES = [
    torch.float32,
    torch.bfloat16,
    torch.float16,
    torch.float64,
    torch.int64,
    torch.int32,
    torch.uint8,
    torch.bool,
]


def rows_of(shape: tuple[int, ...], dtype: torch.dtype, seed: int = 0) -> Tensor:
    bits = torch.randint(0, 256, shape, generator=torch.Generator().manual_seed(seed))
    return bits % 2 == 1 if dtype == torch.bool else bits.to(dtype)


def places(
    batch: int, source: int, length: int, seed: int = 0, share: float = 0.7
) -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(seed)
    index = torch.randint(source, (batch, length), generator=g)
    return index, torch.rand(batch, length, generator=g) < share


def same_rows(kernels: Kernels, x: Tensor, index: Tensor, valid: Tensor) -> Tensor:
    got: Tensor = kernels("compact").compact(x, index, valid)
    want = ops.compact.reference(x, index, valid)
    assert got.dtype == want.dtype
    assert got.shape == want.shape
    assert got.is_contiguous()
    assert torch.equal(got, want)
    return got


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(), (1,), (3,), (64,), (2, 5), (3, 1, 7)])
def test_rows_of_any_type_and_shape(
    interpreted: Kernels, shape: tuple[int, ...], dtype: torch.dtype
) -> None:
    index, valid = places(3, 63, 41)
    x = rows_of((3, 63, *shape), dtype)
    out = same_rows(interpreted, x, index, valid)
    assert (out[~valid] == 0).all()


@pytest.mark.parametrize("n", SIZES)
def test_rows_of_any_length(interpreted: Kernels, n: int) -> None:
    index, valid = places(2, n, n // 3 + 1, seed=n)
    same_rows(interpreted, torch.arange(2 * n).view(2, n), index, valid)
    same_rows(interpreted, torch.randn(2, n, 40), index, valid)


def test_rows_wider_than_a_tile(interpreted: Kernels) -> None:
    index, valid = places(2, 5, 4)
    for dtype in (torch.bfloat16, torch.int64):
        same_rows(interpreted, rows_of((2, 5, 9000), dtype), index, valid)


def test_rows_that_are_not_gathered_do_not_leak(interpreted: Kernels) -> None:
    x = torch.randn(2, 9, 5)
    x[:, 0] = float("nan")
    index, valid = places(2, 9, 30)
    index[~valid] = 0
    valid &= index > 0
    assert same_rows(interpreted, x, index, valid).isfinite().all()


def test_indices_count_from_the_end_as_those_of_torch_do(interpreted: Kernels) -> None:
    index = torch.tensor([[-1, -9, 3], [0, -2, 8]])
    same_rows(interpreted, torch.randn(2, 9, 5), index, torch.ones(2, 3).bool())


def test_rows_of_any_strides(interpreted: Kernels) -> None:
    index, valid = places(4, 20, 11)
    spread, turned = torch.stack([index, -index], -1)[..., 0], valid.t().contiguous().t()
    whole = torch.randn(4, 20, 6, 8)
    for x in (
        whole[:, :, ::2],
        whole.mT,
        whole.transpose(0, 3)[:4],
        whole[:1].expand(4, -1, -1, -1),
        whole[..., 0, 0],
        whole[:, 3:].flip(1),
    ):
        here = spread % x.shape[1]
        same_rows(interpreted, x, here, turned)


@pytest.mark.parametrize(
    ("shape", "length"), [((0, 3, 4), 2), ((2, 3, 4), 0), ((2, 3, 0), 4), ((2, 3, 4, 0), 1)]
)
def test_no_rows(interpreted: Kernels, shape: tuple[int, ...], length: int) -> None:
    index, valid = places(shape[0], shape[1], length)
    same_rows(interpreted, torch.randn(shape), index, valid)


def marks(rows: int, n: int) -> Tensor:
    used = torch.rand(rows, n, generator=torch.Generator().manual_seed(n)) < 0.6
    used[0], used[1], used[2], used[2, n // 2] = True, False, False, True
    return used


@pytest.mark.parametrize("n", [*SIZES, 0, 4096, 9001])
def test_marks_against_the_right_edge(interpreted: Kernels, n: int) -> None:
    used = marks(4, n) if n else torch.zeros(4, 0).bool()
    for width in {0, 1, n // 2, n, n + 5}:
        got = interpreted("packed_index").packed_index(used, width)
        for one, other in zip(got, ops.packed_index.reference(used, width), strict=True):
            assert one.dtype == other.dtype
            assert one.shape == other.shape
            assert torch.equal(one, other)


def test_marks_of_any_strides_and_of_no_rows(interpreted: Kernels) -> None:
    packed = interpreted("packed_index").packed_index
    used = marks(4, 63)
    for view in (used.t().contiguous().t(), torch.stack([used, ~used], -1)[..., 0], used[::2]):
        assert not view.is_contiguous()
        assert torch.equal(packed(view, 50)[0], packed(view.contiguous(), 50)[0])
    assert packed(used[:0], 7)[0].shape == (0, 7)


def triple(
    groups: int, n: int, pairs: int, slots: int, seed: int = 0
) -> tuple[Tensor, Tensor, Tensor]:
    """Pairs in no order, a quarter of them padding, and slots that none names."""
    g = torch.Generator().manual_seed(seed)
    slot = torch.randint(0, max(1, slots - 2), (groups, pairs), generator=g)
    weight = torch.rand(groups, pairs, generator=g) - 0.3
    weight[torch.rand(groups, pairs, generator=g) < 0.25] = 0
    return slot, torch.randint(n, (groups, pairs), generator=g), weight


def check_sums(
    kernels: Kernels, x: Tensor, slot: Tensor, token: Tensor, weight: Tensor, slots: int
) -> Tensor:
    """Errors of at most twice those of plain torch, both against float64."""
    got: Tensor = kernels("group_merge").group_merge(x, slot, token, weight, slots)
    want = ops.group_merge.reference(x, slot, token, weight, slots)
    assert got.dtype == want.dtype
    assert got.shape == want.shape
    terms = x[torch.arange(len(x))[:, None], token].double()
    terms = torch.where(
        (weight != 0).view(*weight.shape, *[1] * (x.dim() - 2)),
        terms * weight.double().view(*weight.shape, *[1] * (x.dim() - 2)),
        0,
    )
    truth = torch.zeros(want.shape, dtype=torch.float64)
    group = torch.arange(len(x))[:, None].expand_as(slot)
    truth.index_put_((group, slot), terms, accumulate=True)
    if x.dtype == torch.bfloat16:  # the interpreter cuts it off, a GPU rounds it as torch does
        want = (truth.float().view(torch.int32) & -0x10000).view(torch.float32)
    if got.numel():
        assert (got - truth).abs().max() <= 2 * (want - truth).abs().max()
    named = torch.zeros(got.shape[:2], dtype=torch.bool)
    named[group[weight != 0], slot[weight != 0]] = True
    assert (got[~named] == 0).all()
    return got


@pytest.mark.parametrize(
    ("n", "pairs", "slots", "dtype"),
    [
        (1, 1, 1, torch.float32),
        (63, 63, 9, torch.float32),
        (63, 63, 9, torch.bfloat16),
        (63, 63, 9, torch.float16),
        (217, 431, 31, torch.bfloat16),
        (577, 577, 20, torch.float32),
        (40, 0, 3, torch.float32),
    ],
)
def test_sums_of_pairs(
    interpreted: Kernels, n: int, pairs: int, slots: int, dtype: torch.dtype
) -> None:
    x = torch.randn(2, n, 24, generator=torch.Generator().manual_seed(n)).to(dtype)
    slot, token, weight = triple(2, n, pairs, slots, seed=n)
    check_sums(interpreted, x, slot, token, weight.to(dtype), slots)


@pytest.mark.parametrize("shape", [(), (1,), (5,), (2, 3), (1100,)])
def test_sums_of_any_shape(interpreted: Kernels, shape: tuple[int, ...]) -> None:
    x = torch.randn(3, 17, *shape, generator=torch.Generator().manual_seed(1))
    check_sums(interpreted, x, *triple(3, 17, 40, 6), 6)


def test_sums_of_one_slot_and_of_one_pair_each(interpreted: Kernels) -> None:
    x, one = torch.randn(1, 63, 5), torch.ones(1, 63)
    token = torch.randperm(63)[None]
    check_sums(interpreted, x, torch.zeros(1, 63).long(), token, one, 4)
    each = check_sums(interpreted, x, token, token, one, 63)
    assert torch.equal(each, x)


def test_sums_do_not_see_the_tokens_of_padding(interpreted: Kernels) -> None:
    x = torch.randn(2, 9, 5)
    x[:, 0] = float("nan")
    slot, token, weight = triple(2, 9, 50, 4)
    weight[token == 0] = 0
    assert check_sums(interpreted, x, slot, token, weight, 4).isfinite().all()


def test_sums_of_a_group_alone_and_of_other_strides_are_the_same_bits(interpreted: Kernels) -> None:
    merge = interpreted("group_merge").group_merge
    x, (slot, token, weight) = torch.randn(3, 17, 12), triple(3, 17, 40, 6)
    together = merge(x, slot, token, weight, 6)
    for g in range(3):
        alone = merge(*(part[g : g + 1] for part in (x, slot, token, weight)), 6)
        assert torch.equal(alone[0], together[g])
    turned = [part.transpose(0, 1).contiguous().transpose(0, 1) for part in (slot, token, weight)]
    assert torch.equal(merge(x.mT.contiguous().mT, *turned, 6), together)


def test_no_sums(interpreted: Kernels) -> None:
    merge = interpreted("group_merge").group_merge
    assert merge(torch.randn(0, 3, 4), *triple(0, 3, 5, 4), 4).shape == (0, 4, 4)
    assert merge(torch.randn(2, 3, 4), *triple(2, 3, 0, 4), 0).shape == (2, 0, 4)


CALLS: dict[str, tuple[Any, ...]] = {
    "compact": (torch.randn(2, 9, 5), *places(2, 9, 4)),
    "packed_index": (marks(4, 63), 40),
    "group_merge": (torch.ones(2, 9, 5), *triple(2, 9, 20, 4), 4),
}


@pytest.mark.parametrize("name", CALLS)
def test_kernels_are_taken_where_they_are_asked_for(interpreted: Kernels, name: str) -> None:
    ran = dict[str, str]()
    with using("triton", ran):
        getattr(ops, name)(*CALLS[name])
    assert ran == {name: "triton"}


@pytest.mark.parametrize(
    ("name", "args", "reason"),
    [
        ("compact", (torch.ones(1, 2, dtype=torch.complex128), *places(1, 2, 3)), "complex128"),
        ("compact", (torch.ones(1, 2, device="meta"), *places(1, 2, 3)), "rows on meta"),
        ("packed_index", (torch.ones(2, 3), 2), "float32 marks"),
        ("group_merge", (torch.ones(1, 2).long(), *triple(1, 2, 3, 2), 2), "int64 tokens"),
        ("group_merge", (torch.ones(1, 2, device="meta"), *triple(1, 2, 3, 2), 2), "on meta"),
    ],
)
def test_what_has_no_kernel_is_refused(
    interpreted: Kernels, name: str, args: tuple[Any, ...], reason: str
) -> None:
    assert reason in interpreted(name).refusal(*args)
    with using("triton"), pytest.raises(OptionError, match=reason):
        getattr(ops, name)(*args)
