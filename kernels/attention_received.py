"""Attention that each key receives: the mean over heads and queries of its softmax weight.

Of each query i the maximum m_i of its logits and w_i = 1 / Σ_j exp(x_ij - m_i), then for each key
j of a head Σ_i w_i exp(x_ij - m_i), then the mean over heads, all in a fixed order. N×N is never
stored: logits are taken twice, which costs less than to write them down.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from vtc.kernels._shared import (
    LOG2E,
    STRIDES,
    accumulate,
    finite,
    load_rows,
    low_precision,
    products,
    refused,
    width_of,
)

_COLUMNS = 128  # keys per program where heads are put together
_PROGRAMS = 2 * 132  # two for each core of an H100, for one row of a batch


class Tiles(NamedTuple):
    """How the work is cut: the numbers to sweep."""

    own: int  # queries of a program of the first kernel, keys of one of the second
    other: int  # keys per step of the first kernel, queries per step of the second
    step: int  # entries of a head per product
    warps: int
    stages: int


@triton.jit(do_not_specialize=["heads", "n", "blocks", *STRIDES])
def attention_received_kernel(
    q: tl.tensor,
    k: tl.tensor,
    valid: tl.tensor,
    rows: tl.tensor,
    scale: tl.tensor,
    heads: tl.tensor,
    n: tl.tensor,
    padded: tl.tensor,
    blocks: tl.tensor,
    q_b: tl.tensor,
    q_h: tl.tensor,
    q_n: tl.tensor,
    q_d: tl.tensor,
    k_b: tl.tensor,
    k_h: tl.tensor,
    k_n: tl.tensor,
    k_d: tl.tensor,
    SIZE: tl.constexpr,
    UNIT: tl.constexpr,
    LOW: tl.constexpr,
    OWN: tl.constexpr,
    OTHER: tl.constexpr,
    STEP: tl.constexpr,
) -> None:
    """Of some queries of a head, m and w: `rows [B, H, 2, padded]`, 0 where not valid.

    Logits are x = scale·q·k, exponentials to the base 2.
    """
    # programs that run at the same time share a head's keys
    head, block = tl.program_id(0) // blocks, tl.program_id(0) % blocks
    head = head.to(tl.int64)
    b, h = head // heads, head % heads
    q += (b * q_b + h * q_h) * UNIT
    k += (b * k_b + h * k_h) * UNIT
    valid += b * n
    at = block * OWN + tl.arange(0, OWN)
    inside = tl.load(valid + at, at < n, other=0).to(tl.int1)
    tile = load_rows(q, at, inside, q_n * UNIT, q_d, 0, SIZE, STEP) if LOW else None
    top = tl.full([OWN], float("-inf"), tl.float32)
    total = tl.zeros([OWN], tl.float32)
    # nothing to do for padding alone
    end = tl.max(inside.to(tl.int32), 0) * n
    for start in range(0, end, OTHER):
        keys = start + tl.arange(0, OTHER)
        there = keys < n
        seen = tl.load(valid + keys, there, other=0).to(tl.int1)
        x = scale * products(
            q, tile, at, inside, q_n * UNIT, q_d, k, keys, there, k_n * UNIT, k_d, SIZE, LOW, STEP
        )
        top, total = accumulate(tl.where(seen[None, :], x, float("-inf")), top, total)
    out = rows + head * 2 * padded + at
    tl.store(out, tl.where(inside, finite(top), 0.0), at < padded)
    tl.store(out + padded, tl.where(inside, 1.0 / total, 0.0), at < padded)


@triton.jit(do_not_specialize=["heads", "n", "blocks", *STRIDES])
def attention_received_keys_kernel(
    q: tl.tensor,
    k: tl.tensor,
    valid: tl.tensor,
    rows: tl.tensor,
    sums: tl.tensor,
    scale: tl.tensor,
    heads: tl.tensor,
    n: tl.tensor,
    padded: tl.tensor,
    blocks: tl.tensor,
    q_b: tl.tensor,
    q_h: tl.tensor,
    q_n: tl.tensor,
    q_d: tl.tensor,
    k_b: tl.tensor,
    k_h: tl.tensor,
    k_n: tl.tensor,
    k_d: tl.tensor,
    SIZE: tl.constexpr,
    UNIT: tl.constexpr,
    LOW: tl.constexpr,
    OWN: tl.constexpr,
    OTHER: tl.constexpr,
    STEP: tl.constexpr,
) -> None:
    """Of some keys of a head, the sum over queries of w·exp2(x - m): `sums [B, H, N]`."""
    head, block = tl.program_id(0) // blocks, tl.program_id(0) % blocks
    head = head.to(tl.int64)
    b, h = head // heads, head % heads
    q += (b * q_b + h * q_h) * UNIT
    k += (b * k_b + h * k_h) * UNIT
    rows += head * 2 * padded
    at = block * OWN + tl.arange(0, OWN)
    inside = tl.load(valid + b * n + at, at < n, other=0).to(tl.int1)
    tile = load_rows(k, at, inside, k_n * UNIT, k_d, 0, SIZE, STEP) if LOW else None
    total = tl.zeros([OWN], tl.float32)
    end = tl.max(inside.to(tl.int32), 0) * n
    for start in range(0, end, OTHER):
        queries = start + tl.arange(0, OTHER)
        there = queries < n
        # a multiple of 16 as the bound lets loads be wide
        written = queries < padded
        m = tl.load(rows + queries, written, other=0.0)[None, :]
        w = tl.load(rows + padded + queries, written, other=0.0)[None, :]
        x = scale * products(
            k, tile, at, inside, k_n * UNIT, k_d,
            q, queries, there, q_n * UNIT, q_d, SIZE, LOW, STEP,
        )  # fmt: skip
        # `where`, not a product: the row of a padding query may be NaN
        total += tl.sum(tl.where(w != 0, tl.exp2(x - m), 0.0) * w, 1)
    tl.store(sums + head * n + at, total, at < n)


@triton.jit(do_not_specialize=["heads", "n"])
def attention_received_mean_kernel(
    sums: tl.tensor,
    valid: tl.tensor,
    out: tl.tensor,
    heads: tl.tensor,
    n: tl.tensor,
    COLUMNS: tl.constexpr,
    COUNTED: tl.constexpr,
) -> None:
    """Mean over heads and valid queries of `sums [B, H, N]`; 0 where not valid."""
    b = tl.program_id(0).to(tl.int64)
    valid += b * n
    counts = tl.zeros([COUNTED], tl.int32)
    for start in range(0, n, COUNTED):
        at = start + tl.arange(0, COUNTED)
        counts += tl.load(valid + at, at < n, other=0).to(tl.int32)
    keys = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    inside = tl.load(valid + keys, keys < n, other=0).to(tl.int1)
    total = tl.zeros([COLUMNS], tl.float32)
    for h in range(heads):
        total += tl.load(sums + (b * heads + h) * n + keys, inside, other=0.0)
    mean = total / (heads * tl.maximum(tl.sum(counts, 0), 1)).to(tl.float32)
    tl.store(out + b * n + keys, mean, keys < n)


def attention_received(q: Tensor, k: Tensor, scale: float, valid: Tensor) -> Tensor:
    """Attention that each key receives, averaged over heads and valid queries; N×N is never stored.

    Args:
        q: `[B, H, N, d]`, any strides.
        k: `[B, H, N, d]`, any strides.
        scale: what q·k is multiplied by.
        valid: `bool[B, N]`.

    Returns:
        `float32[B, N]`; a row sums to 1, 0 where not valid.
    """
    return _launch(q, k, scale, valid)


def refusal(q: Tensor, k: Tensor, scale: float, valid: Tensor) -> str | None:
    """What of these arguments the kernel is not made for; None: it can take them."""
    reason = refused(q, k, valid)
    if reason is None and q.shape != k.shape:
        return f"queries of shape {tuple(q.shape)} and keys of shape {tuple(k.shape)}"
    return reason


def _tiles(q: Tensor, k: Tensor) -> Tiles:
    """Tiles by shape and type; not by the batch, a row of which must not depend on the others."""
    heads, n, width = q.shape[1], q.shape[2], width_of(q.shape[3])
    if not low_precision(q, k):
        # operands of float32 products are held in registers: 16 entries of each row at a time
        return Tiles(64, 64, 16, 8, 2)
    # of 64 columns a thread holds m and w beside its logits and two or three programs share a core;
    # more rows take fewer instructions per logit (compiled for sm_90: 9.9 at 64, 7.6 at 256)
    stages = 2 if width > 128 else 3
    for own, warps in ((256, 8), (128, 4)):
        if own * width <= 2**15 and heads * triton.cdiv(n, own) >= _PROGRAMS:
            return Tiles(own, 64, width, warps, stages)
    return Tiles(64, 64, width, 4, stages)


def _launch(q: Tensor, k: Tensor, scale: float, valid: Tensor, **other: int) -> Tensor:
    """`attention_received` by other tiles."""
    tiles = _tiles(q, k)._replace(**other)
    batch, heads, n, size = q.shape
    blocks, padded = triton.cdiv(n, tiles.own), triton.cdiv(n, 16) * 16
    rows = torch.empty(batch, heads, 2, padded, dtype=torch.float32, device=q.device)
    sums = torch.empty(batch, heads, n, dtype=torch.float32, device=q.device)
    out = torch.empty(batch, n, dtype=torch.float32, device=q.device)
    valid = valid.contiguous()
    # strides in units of 8 entries where they can be: Triton then knows that loads are aligned
    strides = (*q.stride()[:3], *k.stride()[:3])
    unit = 1 if any(s % 8 for s in strides) else 8
    q_b, q_h, q_n, k_b, k_h, k_n = (s // unit for s in strides)
    common = (
        scale * LOG2E, heads, n, padded, blocks,
        q_b, q_h, q_n, q.stride(3), k_b, k_h, k_n, k.stride(3),
    )  # fmt: skip
    shapes = {
        "SIZE": size, "UNIT": unit, "LOW": low_precision(q, k), "OWN": tiles.own,
        "OTHER": tiles.other, "STEP": tiles.step, "num_warps": tiles.warps,
        "num_stages": tiles.stages,
    }  # fmt: skip
    with torch.cuda.device_of(q):
        grid = (batch * heads * blocks,)
        attention_received_kernel[grid](q, k, valid, rows, *common, **shapes)
        attention_received_keys_kernel[grid](q, k, valid, rows, sums, *common, **shapes)
        attention_received_mean_kernel[batch, triton.cdiv(n, _COLUMNS)](
            sums, valid, out, heads, n, COLUMNS=_COLUMNS, COUNTED=1024
        )
    return out
