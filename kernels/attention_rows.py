"""Softmax rows of a few queries against all keys, the mean over heads, in two launches.

A few queries are too little work for a card unless keys are split as well: the first kernel leaves
logits and, per split, their maximum and the sum of exp2(x - maximum); the second puts the splits
together, normalizes and sums over heads in order. Keys are read once, no number depends on the
batch.
"""

from __future__ import annotations

import functools
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

# splits of the keys: enough programs for one query of 16 heads, few enough to be put together at
# once by each program of the second kernel
_SPLITS = 32
# numbers in the logits kept at once (64 MiB), as in the reference
_MAP = 2**24
_GRID = 2**15  # a grid's second and third sides end at 2^16 - 1


class Tiles(NamedTuple):
    """How the work is cut: the numbers to sweep."""

    rows: int  # queries per program, at least a tensor core's 16
    keys: int  # keys per step of a program
    step: int  # entries of a head per product
    warps: int
    stages: int
    columns: int  # keys per program of the second kernel


@triton.jit(do_not_specialize=["heads", "rows", "n", "span", *STRIDES])
def attention_rows_kernel(
    q: tl.tensor,
    k: tl.tensor,
    valid: tl.tensor,
    kept: tl.tensor,
    scale: tl.tensor,
    heads: tl.tensor,
    rows: tl.tensor,
    n: tl.tensor,
    span: tl.tensor,
    width: tl.tensor,
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
    SPLITS: tl.constexpr,
    LOW: tl.constexpr,
    ROWS: tl.constexpr,
    KEYS: tl.constexpr,
    STEP: tl.constexpr,
) -> None:
    """Logits x = scale·q·k of one head, some queries and a split of the keys.

    A row of `kept [B, H, R, width]` holds the maxima of the splits, their sums, and the logits.
    """
    head, split = tl.program_id(0).to(tl.int64), tl.program_id(1)
    b, h = head // heads, head % heads
    q += (b * q_b + h * q_h) * UNIT
    k += (b * k_b + h * k_h) * UNIT
    at = tl.program_id(2) * ROWS + tl.arange(0, ROWS)
    inside = at < rows
    row = kept + (head * rows + at) * width
    tile = load_rows(q, at, inside, q_n * UNIT, q_d, 0, SIZE, STEP) if LOW else None
    top = tl.full([ROWS], float("-inf"), tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    for start in range(split * span, tl.minimum(split * span + span, n), KEYS):
        keys = start + tl.arange(0, KEYS)
        there = keys < n
        x = scale * products(
            q, tile, at, inside, q_n * UNIT, q_d, k, keys, there, k_n * UNIT, k_d, SIZE, LOW, STEP
        )
        seen = there
        if valid is not None:
            seen = tl.load(valid + b * n + keys, there, other=0).to(tl.int1)
        x = tl.where(seen[None, :], x, float("-inf"))
        cells = row[:, None] + (2 * SPLITS + keys)[None, :]
        tl.store(cells, x, inside[:, None] & there[None, :])
        top, total = accumulate(x, top, total)
    tl.store(row + split, top, inside)
    tl.store(row + SPLITS + split, total, inside)


@triton.jit(do_not_specialize=["heads", "n", "splits", "out_b"])
def attention_rows_mean_kernel(
    kept: tl.tensor,
    out: tl.tensor,
    heads: tl.tensor,
    n: tl.tensor,
    splits: tl.tensor,
    width: tl.tensor,
    out_b: tl.tensor,
    SPLITS: tl.constexpr,
    HEADS: tl.constexpr,
    COLUMNS: tl.constexpr,
) -> None:
    """Mean over heads of exp2(x - maximum) / sum, for one query and some keys."""
    b, r, rows = tl.program_id(0).to(tl.int64), tl.program_id(2), tl.num_programs(2)
    keys = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    split = tl.arange(0, SPLITS)
    # cells between the last key and the row's end are loaded too: a bound of 16s lets loads be wide
    held = keys < width - 2 * SPLITS
    mean = tl.zeros([COLUMNS], tl.float32)
    for first in range(0, heads, HEADS):
        h = first + tl.arange(0, HEADS)
        real = h < heads
        row = (kept + ((b * heads + h) * rows + r) * width)[:, None]
        part = real[:, None] & (split < splits)[None, :]
        tops = tl.load(row + split[None, :], part, other=float("-inf"))
        totals = tl.load(row + SPLITS + split[None, :], part, other=0.0)
        x = tl.load(row + 2 * SPLITS + keys[None, :], real[:, None] & held[None, :], other=0.0)
        top = finite(tl.max(tops, 1))[:, None]
        total = tl.sum(totals * tl.exp2(tops - top), 1)[:, None]
        mean += tl.sum(tl.where(real[:, None], tl.exp2(x - top) / total, 0.0), 0)
    tl.store(out + b * out_b + r.to(tl.int64) * n + keys, mean / heads, keys < n)


def attention_rows(q: Tensor, k: Tensor, scale: float, valid: Tensor | None = None) -> Tensor:
    """Softmax attention of a few queries to all keys, averaged over heads; N×N is never formed.

    Args:
        q: `[B, H, R, d]`, the R query rows wanted (one for [CLS]).
        k: `[B, H, N, d]`, any strides.
        scale: what q·k is multiplied by.
        valid: `bool[B, N]`, keys that may be attended to; None: all.

    Returns:
        `float32[B, R, N]`; each row sums to 1 over the valid keys, NaN where there are none.
    """
    return _launch(q, k, scale, valid)


def refusal(q: Tensor, k: Tensor, scale: float, valid: Tensor | None = None) -> str | None:
    """What of these arguments the kernel is not made for; None: it can take them."""
    return refused(q, k, valid)


@functools.cache
def _tiles(rows: int, size: int, low: bool) -> Tiles:
    """Tiles by shape and type; not by the batch, a row of which must not depend on the others."""
    width, rows = width_of(size), min(64, max(16, triton.next_power_of_2(rows)))
    if low:
        # one tile of keys is 8-16 KiB: small, so that 577 tokens make ten splits of each head
        return Tiles(rows, 64 if width <= 128 else 32, width, 4, 3, 64)
    # operands of float32 products are held in registers: 16 entries of each row at a time
    return Tiles(rows, 64, 16, 4, 2, 64)


def _ceil(a: int, b: int) -> int:
    # `triton.cdiv` takes microseconds
    return -(-a // b)


def _launch(q: Tensor, k: Tensor, scale: float, valid: Tensor | None, **other: int) -> Tensor:
    """`attention_rows` by other tiles."""
    (batch, heads, rows, size), n, low = q.shape, k.shape[2], low_precision(q, k)
    tiles = _tiles(rows, size, low)
    if other:
        tiles = tiles._replace(**other)
    span = _ceil(_ceil(n, tiles.keys), _SPLITS) * tiles.keys
    splits, width = _ceil(n, span), 2 * _SPLITS + _ceil(n, 16) * 16
    at_once = min(_MAP // (batch * heads * width), _GRID)
    at_once = max(1, at_once // tiles.rows) * tiles.rows
    out = torch.empty(batch, rows, n, dtype=torch.float32, device=q.device)
    if valid is not None:
        valid = valid.contiguous()
    # strides in units of 8 entries where they can be: Triton then knows that loads are aligned
    strides = (*q.stride()[:3], *k.stride()[:3])
    unit = 1 if any(s % 8 for s in strides) else 8
    q_b, q_h, q_n, k_b, k_h, k_n = (s // unit for s in strides)
    with torch.cuda.device_of(q):
        for first in range(0, rows, at_once):
            part, to, count = q, out, min(at_once, rows - first)
            if count < rows:
                part, to = q[:, :, first : first + count], out[:, first:]
            kept = torch.empty(batch, heads, count, width, dtype=torch.float32, device=q.device)
            attention_rows_kernel[batch * heads, splits, _ceil(count, tiles.rows)](
                part, k, valid, kept, scale * LOG2E, heads, count, n, span, width,
                q_b, q_h, q_n, q.stride(3), k_b, k_h, k_n, k.stride(3),
                SIZE=size, UNIT=unit, SPLITS=_SPLITS, LOW=low, ROWS=tiles.rows,
                KEYS=tiles.keys, STEP=tiles.step, num_warps=tiles.warps, num_stages=tiles.stages,
            )  # fmt: skip
            attention_rows_mean_kernel[batch, _ceil(n, tiles.columns), count](
                kept, to, heads, n, splits, width, out.stride(0), SPLITS=_SPLITS,
                HEADS=min(32, 1 << (heads - 1).bit_length()), COLUMNS=tiles.columns,
            )  # fmt: skip
    return out
