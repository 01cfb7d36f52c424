"""Greedy MAP inference of a determinantal point process: a program for each group runs the whole
loop, what is left of each token in registers, the Cholesky rows in scratch memory. One launch."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from vtc import ops
from vtc.dispatch import constant
from vtc.kernels.group_topk import LARGEST, ordered, store_ascending, warps


def refusal(kernel: Tensor, valid: Tensor, counts: Tensor) -> str | None:
    """Why there is no kernel for these arguments, or None."""
    if kernel.device != valid.device:
        return f"kernels on {kernel.device} with a mask on {valid.device}"
    if valid.shape[1] > LARGEST:
        return f"{valid.shape[1]} tokens in a group (at most {LARGEST})"
    return None


def greedy_map(kernel: Tensor, valid: Tensor, counts: Tensor) -> tuple[Tensor, Tensor]:
    """As `vtc.ops.greedy_map`."""
    (groups, n), device = valid.shape, valid.device
    width = int(counts.max()) if len(counts) else 0
    keep = torch.empty(groups, width, dtype=torch.int64, device=device)
    keep_valid = torch.empty(groups, width, dtype=torch.bool, device=device)
    if not width:
        return keep, keep_valid
    pitch, block = triton.cdiv(n, 16) * 16, max(16, triton.next_power_of_2(n))
    with torch.cuda.device_of(valid):
        greedy_map_kernel[(groups,)](
            kernel,
            valid,
            constant(tuple(counts.tolist()), device),
            torch.empty(groups, width, pitch, device=device),
            keep,
            keep_valid,
            n,
            pitch,
            width,
            *kernel.stride(),
            *valid.stride(),
            SPENT=ops.SPENT,
            EQUAL=ops.EQUAL,
            BLOCK=block,
            ROWS=max(1, min(16, 16_384 // block)),
            num_warps=min(32, 2 * warps(block)),
        )
    return keep, keep_valid


@triton.jit(do_not_specialize=["n", "width"])
def greedy_map_kernel(
    kernel: tl.tensor,
    valid: tl.tensor,
    counts: tl.tensor,
    factor: tl.tensor,
    keep: tl.tensor,
    keep_valid: tl.tensor,
    n: tl.tensor,
    pitch: tl.tensor,
    width: tl.tensor,
    kernel_group: tl.tensor,
    kernel_row: tl.tensor,
    kernel_col: tl.tensor,
    valid_group: tl.tensor,
    valid_token: tl.tensor,
    SPENT: tl.constexpr,
    EQUAL: tl.constexpr,
    BLOCK: tl.constexpr,
    ROWS: tl.constexpr,
) -> None:
    """The greedy loop of one group; factor[g, i] is the Cholesky row of the i-th choice."""
    group = tl.program_id(0).to(tl.int64)
    kernel, factor = kernel + group * kernel_group, factor + group * width * pitch
    at, lane = tl.arange(0, BLOCK), tl.arange(0, ROWS)
    usable = tl.load(valid + group * valid_group + at * valid_token, mask=at < n, other=0) != 0
    diagonal = tl.load(
        kernel + at.to(tl.int64) * (kernel_row + kernel_col), mask=usable, other=0.0
    ).to(tl.float32)
    count = tl.load(counts + group).to(tl.int32)
    left, available = diagonal, usable
    for i in range(count):
        # value and index in one number: a single reduction, ties to the lowest index
        key = ordered(tl.where(available, left, float("-inf")))
        best = tl.max((key.to(tl.int64) << 32) | (BLOCK - 1 - at), 0)
        # NaN leads nowhere, but not out of the group either
        j = tl.minimum((BLOCK - 1 - (best & 0x7FFFFFFF)).to(tl.int64), n - 1)
        bits = (best >> 32).to(tl.int32)
        pivot = (bits ^ ((bits >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True)

        row = tl.load(kernel + j * kernel_row + at * kernel_col, mask=usable, other=0.0)
        row = row.to(tl.float32)
        own = tl.load(kernel + j * (kernel_row + kernel_col)).to(tl.float32)
        known = tl.zeros([BLOCK], tl.float32)
        for first in range(0, i, ROWS):
            earlier = first + lane
            of_j = tl.load(factor + earlier * pitch + j, mask=earlier < i, other=0.0)
            rows = tl.load(
                factor + earlier[:, None] * pitch + at[None, :],
                mask=(earlier < i)[:, None] & (at < pitch)[None, :],
                other=0.0,
            )
            known += tl.sum(of_j[:, None] * rows, 0)
        # down here, so that no reduction keeps the loads above from overlapping
        copies = available & (row >= EQUAL * tl.maximum(diagonal, own))
        pick = tl.minimum(tl.min(tl.where(copies, at, BLOCK), 0), j)
        row = tl.where(pivot > 0, tl.div_rn(row - known, tl.sqrt_rn(pivot)), 0.0)
        tl.store(factor + i * pitch + at, row, mask=at < pitch)
        left -= row * row
        left = tl.where(copies | (left <= SPENT * (i + 1) * diagonal), 0.0, left)
        available = available & (at != pick)
        tl.debug_barrier()

    chosen = usable & (available == 0)
    place = tl.cumsum(chosen.to(tl.int32), 0) - 1
    store_ascending(
        keep + group * width, keep_valid + group * width, chosen, place, count, width, BLOCK
    )
