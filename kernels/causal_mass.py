"""Share of some entries' causal attention that falls on others, in two launches.

Which entries those are is known to the device alone: each program of the first kernel reads the
flags of its row of the batch and goes over the entries between the first that can see one of the
others and the last. As in `attention_rows` keys are split; the second kernel puts the splits
together and sums over heads and entries in order. No number depends on the rest of the batch.
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
    finite,
    load_rows,
    low_precision,
    products,
    refused,
    width_of,
)

_FLAGS = (1024, 4096)  # flags read at once, in a short and in a long sequence
_PAIRS = 2048  # heads × entries that the second kernel holds at once, four a thread


class Tiles(NamedTuple):
    """How the work is cut: the numbers to sweep."""

    own: int  # entries that attend, at once: at least a tensor core's 16
    keys: int  # keys per step of a program
    step: int  # entries of a head per product
    # of the keys, at most. Eight: of 32 heads two programs for each core of an H100, few numbers
    # for the second kernel, which is one program for each row of the batch
    splits: int
    warps: int
    stages: int


@triton.jit
def span_of(
    rows: tl.tensor, onto: tl.tensor, n: tl.tensor, FLAGS: tl.constexpr
) -> tuple[tl.tensor, tl.tensor, tl.tensor]:
    """First and end of the entries in `rows` that see one in `onto`, and how many are in `rows`."""
    seen, low, high, count = n, n, 0, 0
    for start in range(0, n, FLAGS):
        at = start + tl.arange(0, FLAGS)
        own = tl.load(rows + at, at < n, other=0).to(tl.int1)
        aim = tl.load(onto + at, at < n, other=0).to(tl.int1)
        seen = tl.minimum(seen, tl.min(tl.where(aim, at, n), 0))
        low = tl.minimum(low, tl.min(tl.where(own & (at >= seen), at, n), 0))
        high = tl.maximum(high, tl.max(tl.where(own, at + 1, 0), 0))
        count += tl.sum(own.to(tl.int32), 0)
    return low, high, count


@triton.jit(do_not_specialize=["heads", "n", "past", "span", *STRIDES])
def causal_mass_kernel(
    q: tl.tensor,
    k: tl.tensor,
    mask: tl.tensor,
    rows: tl.tensor,
    onto: tl.tensor,
    held: tl.tensor,
    kept: tl.tensor,
    spans: tl.tensor,
    scale: tl.tensor,
    heads: tl.tensor,
    n: tl.tensor,
    past: tl.tensor,
    span: tl.tensor,
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
    ROWS: tl.constexpr,
    KEYS: tl.constexpr,
    STEP: tl.constexpr,
    FLAGS: tl.constexpr,
) -> None:
    """Of one head and a split of the keys: `kept [B, H, 3, splits, S]`.

    For each entry the maximum m of its logits x = scale·q·k, the sum of exp2(x - m), and that of it
    which falls on `onto`; of other entries nothing is written. `spans [B, 3]`: see `span_of`.
    """
    head, split, splits = tl.program_id(0).to(tl.int64), tl.program_id(1), tl.num_programs(1)
    b, h = head // heads, head % heads
    q += (b * q_b + h * q_h) * UNIT
    k += (b * k_b + h * k_h) * UNIT
    mask += b * n
    rows += b * n
    onto += b * n
    low, high, count = span_of(rows, onto, n, FLAGS)
    first = (h == 0) & (split == 0)
    tl.store(spans + b * 3, low, first)
    tl.store(spans + b * 3 + 1, high, first)
    tl.store(spans + b * 3 + 2, count, first)
    for block in range(low, high, ROWS):
        at = block + tl.arange(0, ROWS)
        inside = tl.load(rows + at, at < high, other=0).to(tl.int1)
        tile = load_rows(q, at, inside, q_n * UNIT, q_d, 0, SIZE, STEP) if LOW else None
        top = tl.full([ROWS], float("-inf"), tl.float32)
        total = tl.zeros([ROWS], tl.float32)
        part = tl.zeros([ROWS], tl.float32)
        # no entry sees the keys behind it, and nothing is to be done where there is none
        end = tl.minimum(split * span + span, tl.minimum(block + ROWS, high) + past)
        end *= tl.max(inside.to(tl.int32), 0)
        for start in range(split * span, end, KEYS):
            keys = start + tl.arange(0, KEYS)
            there, own = keys < past + n, keys - past
            new = there & (own >= 0)
            x = scale * products(
                q, tile, at, inside, q_n * UNIT, q_d, k, keys, there, k_n * UNIT, k_d,
                SIZE, LOW, STEP,
            )  # fmt: skip
            seen = tl.load(mask + own, new, other=0).to(tl.int1)
            if held is None:
                seen = seen | (own < 0)
            else:
                seen = seen | tl.load(held + b * past + keys, own < 0, other=0).to(tl.int1)
            aim = tl.load(onto + own, new, other=0).to(tl.int1)
            x = tl.where(seen[None, :] & (own[None, :] <= at[:, None]), x, float("-inf"))
            higher = tl.maximum(top, tl.max(x, 1))
            base = finite(higher)
            x = tl.exp2(x - base[:, None])
            shrunk = tl.exp2(top - base)
            total = total * shrunk + tl.sum(x, 1)
            part = part * shrunk + tl.sum(tl.where(aim[None, :], x, 0.0), 1)
            top = higher
        cell = kept + (head * 3 * splits + split) * n + at
        tl.store(cell, top, inside)
        tl.store(cell + splits * n, total, inside)
        tl.store(cell + 2 * splits * n, part, inside)


@triton.jit(do_not_specialize=["heads", "n", "splits"])
def causal_mass_mean_kernel(
    kept: tl.tensor,
    spans: tl.tensor,
    rows: tl.tensor,
    out: tl.tensor,
    heads: tl.tensor,
    n: tl.tensor,
    splits: tl.tensor,
    SPLITS: tl.constexpr,
    PAIRS: tl.constexpr,
) -> None:
    """Mean over heads and entries of what falls on `onto`, for one row of the batch."""
    b = tl.program_id(0).to(tl.int64)
    low, high = tl.load(spans + b * 3), tl.load(spans + b * 3 + 1)
    width = tl.maximum(high - low, 0)
    mass = tl.zeros([PAIRS], tl.float32)
    for start in range(0, heads * width, PAIRS):
        pair = start + tl.arange(0, PAIRS)
        h, at = pair // width, low + pair % width
        there = h < heads
        inside = tl.load(rows + b * n + at, there, other=0).to(tl.int1)
        # those of other entries too, unwritten: so that no load waits for another
        cell = kept + (b * heads + h) * 3 * splits * n + at
        top = tl.full([PAIRS], float("-inf"), tl.float32)
        total = tl.zeros([PAIRS], tl.float32)
        part = tl.zeros([PAIRS], tl.float32)
        for split in tl.static_range(SPLITS):
            real = there & (split < splits)
            x = tl.load(cell + split * n, real, other=float("-inf"))
            more = tl.load(cell + (splits + split) * n, real, other=0.0)
            some = tl.load(cell + (2 * splits + split) * n, real, other=0.0)
            higher = tl.maximum(top, x)
            base = finite(higher)
            total = total * tl.exp2(top - base) + more * tl.exp2(x - base)
            part = part * tl.exp2(top - base) + some * tl.exp2(x - base)
            top = higher
        mass += tl.where(inside, part / total, 0.0)
    count = tl.maximum(tl.load(spans + b * 3 + 2), 1) * heads
    tl.store(out + b, tl.sum(mass, 0) / count.to(tl.float32))


def causal_mass(
    q: Tensor,
    k: Tensor,
    scale: float,
    mask: Tensor,
    rows: Tensor,
    onto: Tensor,
    held: Tensor | None = None,
) -> Tensor:
    """Share of the causal attention of some entries that falls on others: the mean over heads and
    entries. No map is stored.

    Args:
        q: `[B, H, S, d]`, any strides.
        k: `[B, H, T, d]`, T ≥ S, any strides: the last S keys are those of the entries.
        scale: what q·k is multiplied by.
        mask: `bool[B, S]`, False on padding, which nothing attends to.
        rows: `bool[B, S]`, the entries that attend.
        onto: `bool[B, S]`, the entries attended to.
        held: `bool[B, T − S]`, which keys before those may be attended to; None: all.

    Returns:
        `float32[B]`; 0 where a batch row has no such entries, NaN where one of them is behind one
        of the others and sees nothing.
    """
    return _launch(q, k, scale, mask, rows, onto, held)


def refusal(
    q: Tensor,
    k: Tensor,
    scale: float,
    mask: Tensor,
    rows: Tensor,
    onto: Tensor,
    held: Tensor | None = None,
) -> str | None:
    """What of these arguments the kernel is not made for; None: it can take them."""
    if (why := refused(q, k, None)) is not None:
        return why
    batch, n, past = len(q), q.shape[2], k.shape[2] - q.shape[2]
    if past < 0:
        return f"{k.shape[2]} keys of {n} entries"
    flags = {"mask": (mask, n), "rows": (rows, n), "onto": (onto, n)}
    if held is not None:
        flags["held"] = held, past
    for name, (x, length) in flags.items():
        if x.dtype != torch.bool or x.shape != (batch, length):
            return f"`{name}` of {x.dtype} and shape {tuple(x.shape)}"
        if x.device != q.device:
            return f"tensors on {q.device} and {x.device}"
    return None


@functools.cache
def _tiles(entries: int, size: int, low: bool) -> Tiles:
    """Tiles by shape and type; not by the batch, a row of which must not depend on the others."""
    width, own = width_of(size), min(64, max(16, triton.next_power_of_2(entries)))
    if low:
        wide = width > 128
        return Tiles(own, 32 if wide else 64, width, 8, 4, 2 if wide else 3)
    # operands of float32 products are held in registers: 16 entries of each row at a time
    return Tiles(own, 64, 16, 8, 8, 2)


def _ceil(a: int, b: int) -> int:
    # `triton.cdiv` takes microseconds
    return -(-a // b)


def _launch(
    q: Tensor,
    k: Tensor,
    scale: float,
    mask: Tensor,
    rows: Tensor,
    onto: Tensor,
    held: Tensor | None,
    **other: int,
) -> Tensor:
    """`causal_mass` by other tiles."""
    (batch, heads, n, size), low = q.shape, low_precision(q, k)
    tiles = _tiles(n, size, low)
    if other:
        tiles = tiles._replace(**other)
    past = k.shape[2] - n
    span = _ceil(_ceil(past + n, tiles.keys), tiles.splits) * tiles.keys
    splits = _ceil(past + n, span)
    mask, rows, onto = mask.contiguous(), rows.contiguous(), onto.contiguous()
    held = None if held is None or not past else held.contiguous()
    kept = torch.empty(batch, heads, 3, splits, n, dtype=torch.float32, device=q.device)
    spans = torch.empty(batch, 3, dtype=torch.int32, device=q.device)
    out = torch.empty(batch, dtype=torch.float32, device=q.device)
    # strides in units of 8 entries where they can be: Triton then knows that loads are aligned
    strides = (*q.stride()[:3], *k.stride()[:3])
    unit = 1 if any(s % 8 for s in strides) else 8
    q_b, q_h, q_n, k_b, k_h, k_n = (s // unit for s in strides)
    with torch.cuda.device_of(q):
        causal_mass_kernel[batch * heads, splits](
            q, k, mask, rows, onto, held, kept, spans, scale * LOG2E, heads, n, past, span,
            q_b, q_h, q_n, q.stride(3), k_b, k_h, k_n, k.stride(3),
            SIZE=size, UNIT=unit, LOW=low, ROWS=tiles.own, KEYS=tiles.keys, STEP=tiles.step,
            FLAGS=_FLAGS[n > _FLAGS[0]], num_warps=tiles.warps, num_stages=tiles.stages,
        )  # fmt: skip
        causal_mass_mean_kernel[(batch,)](
            kept, spans, rows, out, heads, n, splits,
            SPLITS=tiles.splits, PAIRS=_PAIRS, num_warps=16,
        )  # fmt: skip
    return out
