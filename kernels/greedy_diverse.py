"""The token least similar to those chosen, again and again, in two launches: all inner products by
tiles, then a program for each group that runs the loop with the likenesses in registers.

A step costs one row of inner products from L2 and one reduction.
"""

from __future__ import annotations

from typing import Literal

import torch
import triton
import triton.language as tl
from torch import Tensor

from vtc.dispatch import constant, interpreted
from vtc.kernels.group_topk import LARGEST, ordered, store_ascending, warps

# of inner products held at once; 16 groups of 2,880 tokens are 0.5 GiB
_SCRATCH = 4 * 2**30
_DTYPES = (torch.bfloat16, torch.float16, torch.float32)


def refusal(
    features: Tensor,
    valid: Tensor,
    counts: Tensor,
    pivot: Tensor,
    objective: Literal["max_sum", "k_center"],
) -> str | None:
    """Why there is no kernel for these arguments, or None."""
    groups, n, _ = features.shape
    if not features.device == valid.device == pivot.device:
        return (
            f"features on {features.device} with a mask on {valid.device} and pivots on "
            f"{pivot.device}"
        )
    if features.dtype not in _DTYPES:
        return f"{features.dtype} features"
    if n > LARGEST:
        return f"{n} tokens in a group (at most {LARGEST})"
    if (size := 4 * groups * n * _pitch(n)) > _SCRATCH:
        return f"{size / 2**30:.1f} GiB of inner products (at most {_SCRATCH // 2**30})"
    return None


def greedy_diverse(
    features: Tensor,
    valid: Tensor,
    counts: Tensor,
    pivot: Tensor,
    objective: Literal["max_sum", "k_center"],
) -> tuple[Tensor, Tensor]:
    """As `vtc.ops.greedy_diverse`."""
    (groups, n, _), device = features.shape, features.device
    width = int(counts.max()) if len(counts) else 0
    keep = torch.empty(groups, width, dtype=torch.int64, device=device)
    keep_valid = torch.empty(groups, width, dtype=torch.bool, device=device)
    if not width:
        return keep, keep_valid
    pitch, block = _pitch(n), max(16, triton.next_power_of_2(n))
    gram = torch.empty(groups, n, pitch, device=device)
    with torch.cuda.device_of(features):
        _fill(gram, features, valid)
        greedy_diverse_kernel[(groups,)](
            gram,
            torch.empty(groups, pitch, device=device),
            valid,
            constant(tuple(counts.tolist()), device),
            pivot.contiguous(),
            keep,
            keep_valid,
            n,
            pitch,
            width,
            *valid.stride(),
            MAX_SUM=objective == "max_sum",
            BLOCK=block,
            num_warps=warps(block),
        )
    return keep, keep_valid


def _pitch(n: int) -> int:
    # rows start at 64 bytes, so that they are read as vectors
    return (n + 15) // 16 * 16


def _fill(gram: Tensor, features: Tensor, valid: Tensor) -> None:
    """Inner products `[G, N, pitch]`, 0 where one of the two is not valid."""
    groups, n, dim = features.shape
    if features.dtype == torch.float32:
        block, step, num_warps = 64, 16, 4
    elif n > 1024:
        block, step, num_warps = 128, 64, 8
    else:
        block, step, num_warps = 64, 128, 4
    if dim % 16:  # read item by item, which takes registers
        block, step, num_warps = 64, min(step, 32), 4
    tiles = triton.cdiv(n, block)
    gram_kernel[(groups * tiles * tiles,)](
        features,
        valid,
        gram,
        n,
        dim,
        gram.shape[2],
        tiles,
        *features.stride(),
        *valid.stride(),
        BLOCK=block,
        STEP=step,
        INTERPRETED=interpreted(),
        num_warps=num_warps,
        num_stages=3,
    )


@triton.jit(do_not_specialize=["n", "tiles"])
def gram_kernel(
    x: tl.tensor,
    valid: tl.tensor,
    gram: tl.tensor,
    n: tl.tensor,
    dim: tl.tensor,
    pitch: tl.tensor,
    tiles: tl.tensor,
    x_group: tl.tensor,
    x_token: tl.tensor,
    x_item: tl.tensor,
    valid_group: tl.tensor,
    valid_token: tl.tensor,
    BLOCK: tl.constexpr,
    STEP: tl.constexpr,
    INTERPRETED: tl.constexpr,
) -> None:
    """gram[g, i, j] = gram[g, j, i] = x[g, i] · x[g, j]."""
    tile = tl.program_id(0) % (tiles * tiles)
    group = (tl.program_id(0) // (tiles * tiles)).to(tl.int64)
    row, col = tile // tiles, tile % tiles
    if col > row:
        return
    i = row * BLOCK + tl.arange(0, BLOCK).to(tl.int64)
    j = col * BLOCK + tl.arange(0, BLOCK).to(tl.int64)
    x, valid = x + group * x_group, valid + group * valid_group
    usable_i = tl.load(valid + i * valid_token, mask=i < n, other=0) != 0
    usable_j = tl.load(valid + j * valid_token, mask=j < n, other=0) != 0
    products = tl.zeros([BLOCK, BLOCK], tl.float32)
    for start in range(0, dim, STEP):
        at = start + tl.arange(0, STEP)
        a = tl.load(
            x + i[:, None] * x_token + at[None, :] * x_item,
            mask=usable_i[:, None] & (at < dim)[None, :],
            other=0.0,
        )
        b = tl.load(
            x + j[None, :] * x_token + at[:, None] * x_item,
            mask=usable_j[None, :] & (at < dim)[:, None],
            other=0.0,
        )
        if INTERPRETED:
            # NumPy's matrix product rounds equal columns differently, and ties would be broken
            terms = a[:, None, :].to(tl.float32) * tl.trans(b)[None, :, :].to(tl.float32)
            products += tl.sum(terms, 2)
        else:
            products = tl.dot(a, b, products, input_precision="ieee")
    gram += group * n * pitch
    tl.store(
        gram + i[:, None] * pitch + j[None, :],
        products,
        mask=(i < n)[:, None] & (j < pitch)[None, :],
    )
    if col < row:
        tl.store(
            gram + j[:, None] * pitch + i[None, :],
            tl.trans(products),
            mask=(j < n)[:, None] & (i < pitch)[None, :],
        )


@triton.jit(do_not_specialize=["n", "width"])
def greedy_diverse_kernel(
    gram: tl.tensor,
    inverse_norms: tl.tensor,
    valid: tl.tensor,
    counts: tl.tensor,
    pivot: tl.tensor,
    keep: tl.tensor,
    keep_valid: tl.tensor,
    n: tl.tensor,
    pitch: tl.tensor,
    width: tl.tensor,
    valid_group: tl.tensor,
    valid_token: tl.tensor,
    MAX_SUM: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    """The greedy loop of one group over its inner products."""
    group = tl.program_id(0).to(tl.int64)
    gram, inverse_norms = gram + group * n * pitch, inverse_norms + group * pitch
    at = tl.arange(0, BLOCK)
    usable = tl.load(valid + group * valid_group + at * valid_token, mask=at < n, other=0) != 0
    square = tl.load(gram + at.to(tl.int64) * (pitch + 1), mask=at < n, other=0.0)
    inverse = tl.div_rn(1.0, tl.maximum(tl.sqrt_rn(square), 1e-12))
    tl.store(inverse_norms + at, inverse, mask=at < n)
    tl.debug_barrier()

    count = tl.load(counts + group).to(tl.int32)
    last = tl.load(pivot + group).to(tl.int32)
    # what can no longer be chosen is infinitely like the chosen, whatever is added to it
    start = 0.0 if MAX_SUM else float("-inf")
    likeness = tl.where(usable, start, float("inf"))
    for _ in range(1, count):
        likeness = tl.where(at == last, float("inf"), likeness)
        products = tl.load(gram + last.to(tl.int64) * pitch + at, mask=at < pitch, other=0.0)
        # −0 becomes 0: the order of keys tells them apart
        cosine = products * (tl.load(inverse_norms + last) * inverse) + 0.0
        likeness = likeness + cosine if MAX_SUM else tl.maximum(likeness, cosine)
        # value and index in one number: a single reduction, ties to the lowest index
        packed = (ordered(likeness).to(tl.int64) << 32) | at
        # NaN leads nowhere, but not out of the group either
        last = tl.minimum((tl.min(packed, 0) & 0x7FFFFFFF).to(tl.int32), n - 1)
    likeness = tl.where((at == last) & (count > 0), float("inf"), likeness)

    chosen = usable & (likeness == float("inf"))
    place = tl.cumsum(chosen.to(tl.int32), 0) - 1
    store_ascending(
        keep + group * width, keep_valid + group * width, chosen, place, count, width, BLOCK
    )
