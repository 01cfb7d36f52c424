"""Gather of rows with zeros on padding: each program copies a tile of rows and columns. Rows are
moved as integers of their items' size, so that all dtypes share a few compiled kernels."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

_INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
# bytes that a program copies of one row: 64 a thread, which is four vectors of 16
_BYTES = 8192
# of short rows, a program takes as many as make this number of items
_ITEMS = 1024


def refusal(x: Tensor, index: Tensor, valid: Tensor) -> str | None:
    """Why there is no kernel for these arguments, or None."""
    if not x.device == index.device == valid.device:
        return f"rows on {x.device} with an index on {index.device} and a mask on {valid.device}"
    return None if x.itemsize in _INTEGERS else f"{x.dtype} rows"


def compact(x: Tensor, index: Tensor, valid: Tensor) -> Tensor:
    """As `vtc.ops.compact`."""
    out = torch.empty(*index.shape, *x.shape[2:], dtype=x.dtype, device=x.device)
    if not out.numel():
        return out
    dtype = _INTEGERS[x.itemsize]
    rows = (x.flatten(2) if x.dim() > 2 else x[..., None]).view(dtype)
    width = rows.shape[2]
    block = min(triton.next_power_of_2(width), _BYTES // x.itemsize)
    tile = max(1, _ITEMS // block)
    with torch.cuda.device_of(x):
        compact_kernel[(triton.cdiv(index.numel(), tile), triton.cdiv(width, block))](
            rows,
            index.contiguous(),
            valid.contiguous(),
            out.view(dtype),
            index.numel(),
            index.shape[1],
            rows.shape[1],
            width,
            *rows.stride(),
            ROWS=tile,
            BLOCK=block,
            num_warps=4,
        )
    return out


@triton.jit(do_not_specialize=["rows", "length", "source_length"])
def compact_kernel(
    x: tl.tensor,
    index: tl.tensor,
    valid: tl.tensor,
    out: tl.tensor,
    rows: tl.tensor,
    length: tl.tensor,
    source_length: tl.tensor,
    width: tl.tensor,
    x_batch: tl.tensor,
    x_row: tl.tensor,
    x_item: tl.tensor,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    """out[b, l] = x[b, index[b, l]] if valid[b, l] else 0."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    at = tl.program_id(1).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = row < rows
    kept = tl.load(valid + row, mask=inside, other=0) != 0
    source = tl.load(index + row, mask=inside, other=0)
    source = tl.where(source < 0, source + source_length, source)
    start = x + (row // length) * x_batch + source * x_row
    value = tl.load(
        start[:, None] + at[None, :] * x_item,
        mask=kept[:, None] & (at < width)[None, :],
        other=0,
    )
    tl.store(
        out + row[:, None] * width + at[None, :],
        value,
        mask=inside[:, None] & (at < width)[None, :],
    )
