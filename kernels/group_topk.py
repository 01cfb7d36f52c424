"""Top-k of each group with its own k: the k-th highest score is found bit by bit, and what is at or
above it stored in order by one prefix sum. One launch, a program for each group."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from vtc.dispatch import constant

# tokens of a group that a program holds in registers: 16 a thread at 32 warps
LARGEST = 16_384


def refusal(scores: Tensor, valid: Tensor, counts: Tensor) -> str | None:
    """Why there is no kernel for these arguments, or None."""
    if scores.device != valid.device:
        return f"scores on {scores.device} with a mask on {valid.device}"
    if scores.shape[1] > LARGEST:
        return f"{scores.shape[1]} tokens in a group (at most {LARGEST})"
    return None


def group_topk(scores: Tensor, valid: Tensor, counts: Tensor) -> tuple[Tensor, Tensor]:
    """As `vtc.ops.group_topk`."""
    (groups, n), width = scores.shape, int(counts.max()) if len(counts) else 0
    keep = torch.empty(groups, width, dtype=torch.int64, device=scores.device)
    keep_valid = torch.empty(groups, width, dtype=torch.bool, device=scores.device)
    if not width:
        return keep, keep_valid
    block = max(16, triton.next_power_of_2(n))
    with torch.cuda.device_of(scores):
        group_topk_kernel[(groups,)](
            scores,
            valid,
            constant(tuple(counts.tolist()), scores.device),
            keep,
            keep_valid,
            n,
            width,
            *scores.stride(),
            *valid.stride(),
            BLOCK=block,
            num_warps=warps(block),
        )
    return keep, keep_valid


def warps(block: int) -> int:
    """Warps of a program that holds a group of up to `block` tokens in registers."""
    return max(4, block // 512)


@triton.jit
def ordered(x: tl.tensor) -> tl.tensor:
    """float32 -> int32 that compares alike, with −0 below 0."""
    bits = x.to(tl.int32, bitcast=True)
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)


@triton.jit
def sort_key(score: tl.tensor, usable: tl.tensor) -> tl.tensor:
    """Scores as uint32 that compare alike. NaN is above all, as sorting has it; even -inf leaves 0
    to what is not usable."""
    score = score + 0.0  # −0 becomes 0
    key = tl.where(score != score, 0x7FFFFFFF, ordered(score)).to(tl.uint32, bitcast=True)
    return tl.where(usable, key ^ 0x80000000, 0)


@triton.jit
def reached_by(key: tl.tensor, count: tl.tensor) -> tl.tensor:
    """The highest threshold that `count` keys reach, bit by bit."""
    threshold = tl.full([], 0, tl.uint32)
    bit = tl.full([], 0x80000000, tl.uint32)
    for _ in range(32):
        raised = threshold | bit
        reached = tl.sum((key >= raised).to(tl.int32), 0)
        threshold = tl.where(reached >= count, raised, threshold)
        bit = bit >> 1
    return threshold


@triton.jit
def store_ascending(
    keep: tl.tensor,
    keep_valid: tl.tensor,
    chosen: tl.tensor,
    place: tl.tensor,
    total: tl.tensor,
    width: tl.tensor,
    BLOCK: tl.constexpr,
) -> None:
    """Write the indices of the `total` chosen tokens to their places, and padding behind them."""
    at = tl.arange(0, BLOCK)
    tl.store(keep + place, at.to(tl.int64), mask=chosen & (place < width))
    tl.store(keep + at, tl.zeros([BLOCK], tl.int64), mask=(at >= total) & (at < width))
    tl.store(keep_valid + at, at < total, mask=at < width)


@triton.jit(do_not_specialize=["n", "width"])
def group_topk_kernel(
    scores: tl.tensor,
    valid: tl.tensor,
    counts: tl.tensor,
    keep: tl.tensor,
    keep_valid: tl.tensor,
    n: tl.tensor,
    width: tl.tensor,
    scores_group: tl.tensor,
    scores_token: tl.tensor,
    valid_group: tl.tensor,
    valid_token: tl.tensor,
    BLOCK: tl.constexpr,
) -> None:
    """keep[g, :counts[g]] = the highest scores of group g, ascending."""
    group = tl.program_id(0).to(tl.int64)
    at = tl.arange(0, BLOCK)
    usable = tl.load(valid + group * valid_group + at * valid_token, mask=at < n, other=0) != 0
    score = tl.load(scores + group * scores_group + at * scores_token, mask=usable, other=0.0)
    key = sort_key(score.to(tl.float32), usable)
    count = tl.load(counts + group).to(tl.int32)
    threshold = reached_by(key, count)
    above, level = key > threshold, usable & (key == threshold)
    wanted = count - tl.sum(above.to(tl.int32), 0)
    # both counts in one prefix sum: neither exceeds 2^14
    before = tl.cumsum(above.to(tl.int32) * 0x10000 + level.to(tl.int32), 0)
    rank = before & 0xFFFF
    chosen = above | (level & (rank <= wanted))
    place = (before >> 16) + tl.minimum(rank, wanted) - 1
    store_ascending(
        keep + group * width, keep_valid + group * width, chosen, place, count, width, BLOCK
    )
