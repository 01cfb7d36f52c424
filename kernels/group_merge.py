"""Weighted sums of tokens in two launches: the pairs of each group are brought into the order of
their slots by counting those before each, then a program for each slot sums its own in that order.

No atomics: the same pairs give the same bits.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

_DTYPES = (torch.bfloat16, torch.float16, torch.float32)
# columns of a slot that a program sums, and pairs that it reads at once
_BLOCK = 1024
_PAIRS = 4


def refusal(x: Tensor, slot: Tensor, token: Tensor, weight: Tensor, slots: int) -> str | None:
    """Why there is no kernel for these arguments, or None."""
    if not x.device == slot.device == token.device == weight.device:
        return f"tokens on {x.device} with pairs on another device"
    return None if x.dtype in _DTYPES else f"{x.dtype} tokens"


def group_merge(x: Tensor, slot: Tensor, token: Tensor, weight: Tensor, slots: int) -> Tensor:
    """As `vtc.ops.group_merge`."""
    groups, pairs = slot.shape
    out = torch.empty(groups, slots, *x.shape[2:], dtype=x.dtype, device=x.device)
    if not out.numel():
        return out
    rows = x.flatten(2) if x.dim() > 2 else x[..., None]
    width = rows.shape[2]
    tokens = torch.empty_like(token, memory_format=torch.contiguous_format)
    weights = torch.empty(groups, pairs, device=x.device)
    starts = torch.empty(groups, slots + 1, dtype=torch.int32, device=x.device)
    with torch.cuda.device_of(x):
        order_kernel[(groups, triton.cdiv(pairs + slots + 1, 16))](
            slot.contiguous(),
            token.contiguous(),
            weight.contiguous(),
            tokens,
            weights,
            starts,
            pairs,
            slots,
            BLOCK=16,
            OTHERS=256,
            num_warps=4,
        )
        block = min(triton.next_power_of_2(width), _BLOCK)
        group_merge_kernel[(slots, triton.cdiv(width, block), groups)](
            rows,
            tokens,
            weights,
            starts,
            out,
            pairs,
            slots,
            width,
            *rows.stride(),
            PAIRS=_PAIRS,
            BLOCK=block,
            num_warps=4,
        )
    return out


@triton.jit(do_not_specialize=["pairs", "slots"])
def order_kernel(
    slot: tl.tensor,
    token: tl.tensor,
    weight: tl.tensor,
    tokens: tl.tensor,
    weights: tl.tensor,
    starts: tl.tensor,
    pairs: tl.tensor,
    slots: tl.tensor,
    BLOCK: tl.constexpr,
    OTHERS: tl.constexpr,
) -> None:
    """tokens[g], weights[g] = the pairs of group g sorted by slot, stably; starts[g, s] = the first
    of slot s."""
    group = tl.program_id(0).to(tl.int64)
    slot, token, weight = slot + group * pairs, token + group * pairs, weight + group * pairs
    entry = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    is_pair = entry < pairs
    own = tl.load(weight + entry, mask=is_pair, other=0.0).to(tl.float32)
    own_slot = tl.load(slot + entry, mask=is_pair & (own != 0), other=0).to(tl.int64)
    # where slot s starts is asked as if by a pair of s before all others
    asked = tl.where(is_pair, own_slot * pairs + entry, (entry - pairs).to(tl.int64) * pairs)
    lower = tl.zeros([BLOCK, OTHERS], tl.int32)
    for first in range(0, pairs, OTHERS):
        other = first + tl.arange(0, OTHERS)
        there = tl.load(weight + other, mask=other < pairs, other=0.0).to(tl.float32) != 0
        at = tl.load(slot + other, mask=there, other=0).to(tl.int64) * pairs + other
        lower += (there[None, :] & (at[None, :] < asked[:, None])).to(tl.int32)
    before = tl.sum(lower, 1)
    put = is_pair & (own != 0)
    tl.store(tokens + group * pairs + before, tl.load(token + entry, mask=put, other=0), mask=put)
    tl.store(weights + group * pairs + before, own, mask=put)
    is_start = (entry >= pairs) & (entry <= pairs + slots)
    tl.store(starts + group * (slots + 1) + entry - pairs, before, mask=is_start)


@triton.jit(do_not_specialize=["pairs", "slots"])
def group_merge_kernel(
    x: tl.tensor,
    tokens: tl.tensor,
    weights: tl.tensor,
    starts: tl.tensor,
    out: tl.tensor,
    pairs: tl.tensor,
    slots: tl.tensor,
    width: tl.tensor,
    x_group: tl.tensor,
    x_token: tl.tensor,
    x_item: tl.tensor,
    PAIRS: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    """out[g, s] = Σ weight · x[g, token] over the pairs of slot s."""
    slot, group = tl.program_id(0).to(tl.int64), tl.program_id(2).to(tl.int64)
    at = tl.program_id(1).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside, lane = at < width, tl.arange(0, PAIRS)
    x += group * x_group
    starts += group * (slots + 1) + slot
    end = tl.load(starts + 1)
    total = tl.zeros([BLOCK], tl.float32)
    for first in range(tl.load(starts), end, PAIRS):
        pair = first + lane
        token = tl.load(tokens + group * pairs + pair, mask=pair < end, other=0)
        weight = tl.load(weights + group * pairs + pair, mask=pair < end, other=0.0)
        rows = tl.load(
            x + (token * x_token)[:, None] + (at * x_item)[None, :],
            mask=(pair < end)[:, None] & inside[None, :],
            other=0.0,
        )
        total += tl.sum(rows.to(tl.float32) * weight[:, None], 0)
    tl.store(out + (group * slots + slot) * width + at, total, mask=inside)
