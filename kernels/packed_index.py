"""Where rows are True, against the right edge: rows are read from their end, in blocks. One launch,
a program for each row."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from vtc.kernels.group_topk import warps

_BLOCK = 4096


def refusal(used: Tensor, width: int) -> str | None:
    """Why there is no kernel for these arguments, or None."""
    return None if used.dtype == torch.bool else f"{used.dtype} marks (only torch.bool)"


def packed_index(used: Tensor, width: int) -> tuple[Tensor, Tensor]:
    """As `vtc.ops.packed_index`."""
    rows, length = used.shape
    index = torch.empty(rows, width, dtype=torch.int64, device=used.device)
    valid = torch.empty(rows, width, dtype=torch.bool, device=used.device)
    if index.numel():
        block = min(_BLOCK, max(16, triton.next_power_of_2(length)))
        with torch.cuda.device_of(used):
            packed_index_kernel[(rows,)](
                used,
                index,
                valid,
                length,
                width,
                *used.stride(),
                BLOCK=block,
                num_warps=warps(block),
            )
    return index, valid


@triton.jit(do_not_specialize=["length", "width"])
def packed_index_kernel(
    used: tl.tensor,
    index: tl.tensor,
    valid: tl.tensor,
    length: tl.tensor,
    width: tl.tensor,
    used_row: tl.tensor,
    used_entry: tl.tensor,
    BLOCK: tl.constexpr,
) -> None:
    """index[b, width - r] = the r-th True entry of row b from its end."""
    row = tl.program_id(0).to(tl.int64)
    used, index, valid = used + row * used_row, index + row * width, valid + row * width
    lane = tl.arange(0, BLOCK)
    behind = tl.full([], 0, tl.int32)
    for back in range(tl.cdiv(length, BLOCK)):
        at = (tl.cdiv(length, BLOCK) - 1 - back) * BLOCK + lane
        here = tl.load(used + at.to(tl.int64) * used_entry, mask=at < length, other=0) != 0
        total = tl.sum(here.to(tl.int32), 0)
        rank = behind + total - tl.cumsum(here.to(tl.int32), 0) + 1
        fits = here & (rank <= width)
        tl.store(index + (width - rank), at.to(tl.int64), mask=fits)
        behind += total
    padding = width - tl.minimum(behind, width)
    for start in range(0, width, BLOCK):
        at = start + lane
        tl.store(index + at, tl.zeros([BLOCK], tl.int64), mask=at < padding)
        tl.store(valid + at, at >= padding, mask=at < width)
