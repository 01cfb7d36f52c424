"""FlowCut's kernels, interpreted: scores within rounding of the plain formula, the same choice."""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

from vtc.scorers import flow

Kernels = Callable[[str], ModuleType]
REFERENCE: Any = flow.flow_step.reference  # type: ignore[attr-defined]


def arguments(
    units: int,
    m: int = 1,
    remaining: int = 4,
    rows: int = 3,
    heads: int = 2,
    size: int = 16,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
) -> tuple[Any, ...]:
    """A block behind others; hidden patches hold what they like."""
    g = torch.Generator().manual_seed(1000 * seed + units)
    q, k, v = (
        torch.randn(rows, 1 + units * m, heads, size, generator=g).transpose(1, 2) for _ in "qkv"
    )
    valid = torch.rand(rows, units, generator=g) < 0.7
    valid[:, units // 2] = True
    hidden = ~valid.repeat_interleave(m, 1)
    for x in (k, v):
        x[:, :, 1:].masked_fill_(hidden[:, None, :, None], 1e4)
    before = torch.rand(rows, units, generator=g).masked_fill(~valid, 0)
    targets = (
        (valid.sum(-1) * torch.tensor([0.2, 1.0, 0.5]).repeat(rows)[:rows]).long().clamp_min(1)
    )
    q, k, v = (x.to(dtype) for x in (q, k, v))
    return q[:, :, :1], k, v, size**-0.5, valid, before, targets, remaining


def compare(kernels: Kernels, *args: Any) -> tuple[Tensor, Tensor]:
    score, keep = kernels("flow_step").flow_step(*args)
    want, kept = REFERENCE(*args)
    assert score.dtype == want.dtype and score.shape == want.shape and keep.shape == kept.shape
    torch.testing.assert_close(score, want, atol=1e-5, rtol=1e-5)
    assert torch.equal(keep, kept)
    return score, keep


@pytest.mark.parametrize("remaining", [0, 4, 20])
@pytest.mark.parametrize("units", [1, 2, 15, 63, 217, 431, 576])
def test_equals_the_formula(interpreted: Kernels, units: int, remaining: int) -> None:
    args = arguments(units, remaining=remaining)
    valid, targets = args[4], args[6]
    score, keep = compare(interpreted, *args)
    assert not (keep & ~valid).any() and score[~valid].eq(0).all()
    assert (keep.sum(-1) >= targets).all() and keep.any(1).all()
    if not remaining:
        assert torch.equal(keep.sum(-1), targets)


@pytest.mark.parametrize("units", [1, 9, 63, 256])
def test_units_of_four_patches(interpreted: Kernels, units: int) -> None:
    compare(interpreted, *arguments(units, m=4, remaining=2))


@pytest.mark.parametrize(("heads", "size"), [(1, 32), (3, 72), (16, 64), (20, 48)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_heads_of_any_kind(interpreted: Kernels, heads: int, size: int, dtype: torch.dtype) -> None:
    args = arguments(40, heads=heads, size=size, dtype=dtype)
    compare(interpreted, *args)
    assert interpreted("flow_step").refusal(*args) is None


def test_the_first_block_and_blocks_without_a_cut(interpreted: Kernels) -> None:
    q, k, v, scale, valid, before, targets, _ = arguments(63)
    first, _ = compare(interpreted, q, k, v, scale, valid, None, None, 3)
    later, keep = compare(interpreted, q, k, v, scale, valid, before, None, 3)
    assert torch.equal(keep, valid)
    torch.testing.assert_close(later, 0.5 * before + 0.5 * first)
    compare(interpreted, q, k, v, scale, valid, None, targets, 2)


def test_equal_scores_keep_the_first(interpreted: Kernels) -> None:
    q, k, v, scale, valid, _, targets, _ = arguments(63)
    k[:], v[:] = k[:, :, 1:2], v[:, :, 1:2]
    _, keep = compare(interpreted, q, k, v, scale, valid, None, targets, 0)
    for row, there, n in zip(keep, valid, targets.tolist(), strict=True):
        assert torch.equal(row.nonzero(), there.nonzero()[:n])


def test_a_row_alone_is_as_in_a_batch(interpreted: Kernels) -> None:
    args = arguments(63)
    score, keep = compare(interpreted, *args)
    for r in range(3):
        alone = [x[r : r + 1] if isinstance(x, Tensor) else x for x in args]
        one, kept = interpreted("flow_step").flow_step(*alone)
        assert torch.equal(one[0], score[r]) and torch.equal(kept[0], keep[r])


@pytest.mark.parametrize(("units", "m"), [(1, 1), (63, 1), (63, 4), (217, 1)])
def test_rows_of_an_image_drop_together(interpreted: Kernels, units: int, m: int) -> None:
    args = list(arguments(units, m, remaining=2, rows=5))
    args[0] = 4 * args[0]  # concentrated: amounts differ
    image = torch.tensor([3, 0, 0, 0, 3])
    _, keep = compare(interpreted, *args, image)
    for of in (3, 0):
        alone = [x[image == of] if isinstance(x, Tensor) else x for x in args]
        _, kept = interpreted("flow_step").flow_step(*alone, torch.zeros_like(image[image == of]))
        assert torch.equal(kept, keep[image == of])
    many = [torch.cat([x] * 4) if isinstance(x, Tensor) else x for x in args]
    _, kept = compare(interpreted, *many, torch.cat([image] * 4))
    assert torch.equal(kept[-5:], keep)
    if units > 1:
        assert not torch.equal(keep, interpreted("flow_step").flow_step(*args)[1])
    compare(interpreted, *args[:-1], 0, image)
    compare(interpreted, *args[:-2], None, 2, image)


def test_rows_of_nothing_keep_nothing(interpreted: Kernels) -> None:
    args = list(arguments(31))
    args[4][0], args[6][0] = False, 0
    score, keep = compare(interpreted, *args)
    assert not keep[0].any() and score[0].eq(0).all() and keep[1].any()


def test_what_is_refused_is_named(interpreted: Kernels) -> None:
    refusal = interpreted("flow_step").refusal
    assert "power of two" in refusal(*arguments(9, m=3))
    assert "patches in a row" in refusal(*arguments(4097, rows=1, heads=1))
    args = list(arguments(9))
    assert "float64" in refusal(*(x.double() if i < 3 else x for i, x in enumerate(args)))
