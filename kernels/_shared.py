"""What the attention kernels share: tiles of q·k, a softmax's maximum and sum, what is refused."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from vtc.dispatch import interpreted

LOG2E = 1.4426950408889634  # exp(x) = exp2(x·log2 e): the hardware has exp2
# how they are aligned is told by `UNIT`: one compiled kernel for all shapes
STRIDES = ("q_b", "q_h", "q_n", "k_b", "k_h", "k_n")
_DTYPES = (torch.float16, torch.bfloat16, torch.float32)
_WIDEST = 256


@triton.jit
def load_rows(
    x: tl.tensor,
    at: tl.tensor,
    there: tl.tensor,
    x_n: tl.tensor,
    x_d: tl.tensor,
    start: tl.tensor,
    SIZE: tl.constexpr,
    WIDTH: tl.constexpr,
) -> tl.tensor:
    """Entries `start`.. of some rows of a head: `[rows, WIDTH]`, 0 where there is nothing."""
    entries = start + tl.arange(0, WIDTH)
    mask = there[:, None]
    if SIZE % WIDTH != 0:
        mask = mask & (entries < SIZE)[None, :]
    return tl.load(x + at.to(tl.int64)[:, None] * x_n + entries[None, :] * x_d, mask, other=0.0)


@triton.jit
def products(
    a: tl.tensor,
    a_tile: tl.tensor,
    a_at: tl.tensor,
    a_in: tl.tensor,
    a_n: tl.tensor,
    a_d: tl.tensor,
    b: tl.tensor,
    b_at: tl.tensor,
    b_in: tl.tensor,
    b_n: tl.tensor,
    b_d: tl.tensor,
    SIZE: tl.constexpr,
    LOW: tl.constexpr,
    STEP: tl.constexpr,
) -> tl.tensor:
    """Inner products of some rows of `a` with some of `b`: `float32[A, B]`.

    `LOW`: of 16-bit numbers on tensor cores, `a_tile` being the rows of `a` and `STEP` no less than
    a row. Else of float32, exactly so, `STEP` entries at a time: their operands live in registers.
    """
    if LOW:
        return tl.dot(a_tile, tl.trans(load_rows(b, b_at, b_in, b_n, b_d, 0, SIZE, STEP)))
    else:
        total = tl.zeros([a_at.shape[0], b_at.shape[0]], tl.float32)
        for start in range(0, SIZE, STEP):
            left = load_rows(a, a_at, a_in, a_n, a_d, start, SIZE, STEP).to(tl.float32)
            right = load_rows(b, b_at, b_in, b_n, b_d, start, SIZE, STEP).to(tl.float32)
            total = tl.dot(left, tl.trans(right), total, input_precision="ieee")
        return total


@triton.jit
def finite(top: tl.tensor) -> tl.tensor:
    """A maximum to subtract: 0 for that of a row of nothing, as -inf - -inf is NaN."""
    return tl.where(top == float("-inf"), 0.0, top)


@triton.jit
def accumulate(x: tl.tensor, top: tl.tensor, total: tl.tensor) -> tuple[tl.tensor, tl.tensor]:
    """The maximum and the sum of exp2(x - maximum) of rows, with some more columns `x`."""
    new = tl.maximum(top, tl.max(x, 1))
    base = finite(new)
    more = tl.sum(tl.exp2(x - base[:, None]), 1)
    return new, total * tl.exp2(top - base) + more


def refused(q: Tensor, k: Tensor, valid: Tensor | None) -> str | None:
    """What of an attention's arguments no kernel is made for; None: nothing."""
    for name, x in (("queries", q), ("keys", k)):
        if x.dtype not in _DTYPES:
            return f"{name} of {x.dtype}"
        if x.dim() != 4 or 0 in x.shape:
            return f"{name} of shape {tuple(x.shape)}"
    if q.shape[:2] != k.shape[:2] or q.shape[3] != k.shape[3]:
        return f"queries of shape {tuple(q.shape)} and keys of shape {tuple(k.shape)}"
    if k.shape[3] > _WIDEST:
        return f"a head size of {k.shape[3]}, above {_WIDEST}"
    if valid is not None and (valid.dtype != torch.bool or valid.shape != k.shape[::2]):
        return f"`valid` of {valid.dtype} and shape {tuple(valid.shape)}"
    devices = {x.device for x in (q, k, valid) if x is not None}
    if len(devices) > 1:
        return f"tensors on {' and '.join(sorted(map(str, devices)))}"
    return None


def width_of(size: int) -> int:
    """Entries of a head that a tile holds: the next power of two, at least a tensor core's 16."""
    return max(16, int(triton.next_power_of_2(size)))


def low_precision(q: Tensor, k: Tensor) -> bool:
    """Whether products are taken on tensor cores: q and k of the same 16-bit type."""
    # Triton's interpreter multiplies the bits of bfloat16 as integers
    low = (torch.float16,) if interpreted() else (torch.float16, torch.bfloat16)
    return q.dtype == k.dtype and q.dtype in low
