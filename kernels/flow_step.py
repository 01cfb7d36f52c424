"""One block of FlowCut in two launches: logits of [CLS] with every patch and sizes of values, then,
one program for each row, softmaxes, score, amount and the choice. Rows that drop together (crops of
an image) choose in a third, when all amounts are known; nothing else is shared among rows."""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from vtc.kernels._shared import LOG2E, refused, width_of
from vtc.kernels.group_topk import reached_by, sort_key

# patches of a row that a program holds in registers, for several heads at once
LARGEST = 4096
_TILE = 2**14  # logits that it holds at once
# entries of keys, and of values, that a program of the first kernel loads at once: those of four
# patches of 16 heads of 64, 145 programs for 577 of them
_ENTRIES = 2**12
_ROWS = 16  # rows whose amounts are looked at at once: a tiled image has about as many
_TINY = torch.finfo(torch.float32).tiny
_EVEN = 1.5 * 2**23  # adding it rounds to whole numbers, half to even


def refusal(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    scale: float,
    valid: Tensor,
    before: Tensor | None,
    targets: Tensor | None,
    remaining: int,
    together: Tensor | None = None,
) -> str | None:
    """Why there is no kernel for these arguments, or None."""
    if (why := refused(query, key, None) or refused(query, value, None)) is not None:
        return why
    patches = key.shape[2] - 1
    if not patches or patches > LARGEST:
        return f"{patches} patches in a row (1 to {LARGEST})"
    if (m := patches // max(valid.shape[1], 1)) & (m - 1):
        return f"units of {m} patches, which is no power of two"
    return None


def flow_step(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    scale: float,
    valid: Tensor,
    before: Tensor | None,
    targets: Tensor | None,
    remaining: int,
    together: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """As `vtc.scorers.flow.flow_step`."""
    rows, heads, n, size = key.shape
    units, valid = valid.shape[1], valid.contiguous()
    logits = torch.empty(rows, 2, heads, n, dtype=torch.float32, device=key.device)
    sizes = torch.empty(rows, n, dtype=torch.float32, device=key.device)
    score = torch.empty(rows, units, dtype=torch.float32, device=key.device)
    keep = valid if targets is None else torch.empty_like(valid)
    apart = together is None or targets is None or not remaining
    amounts = None if apart else torch.empty(rows, dtype=torch.int32, device=key.device)
    width, block = width_of(size), max(16, triton.next_power_of_2(n - 1))
    heads_at_once = min(16, triton.next_power_of_2(heads))
    keys = max(1, _ENTRIES // (heads_at_once * width))
    at_once = max(1, min(triton.next_power_of_2(heads), _TILE // block))
    with torch.cuda.device_of(key):
        flow_logits_kernel[(-(-n // keys), rows)](
            query, key, value, logits, sizes, scale * LOG2E, heads, n,
            *query.stride()[:2], query.stride(3), *key.stride(), *value.stride(),
            SIZE=size, WIDTH=width, KEYS=keys, HEADS=heads_at_once, LOG2=LOG2E, num_warps=4,
        )  # fmt: skip
        flow_step_kernel[(rows,)](
            logits, sizes, valid, None if before is None else before.contiguous(), targets,
            score, keep, amounts, heads, n, units, 1 / math.sqrt(max(remaining, 1)),
            LAST=remaining == 0, M=(n - 1) // units, BLOCK=block, HEADS=at_once,
            TINY=_TINY, EVEN=_EVEN, num_warps=max(4, min(16, block * at_once // 1024)),
        )  # fmt: skip
        if amounts is not None:
            flow_choice_kernel[(rows,)](
                score, valid, targets, amounts, together, keep, rows, units,
                BLOCK=block // ((n - 1) // units), ROWS=_ROWS, num_warps=4,
            )  # fmt: skip
    return score, keep


@triton.jit(do_not_specialize=["heads", "n"])
def flow_logits_kernel(
    query: tl.tensor,
    key: tl.tensor,
    value: tl.tensor,
    logits: tl.tensor,
    sizes: tl.tensor,
    scale: tl.tensor,
    heads: tl.tensor,
    n: tl.tensor,
    q_r: tl.tensor,
    q_h: tl.tensor,
    q_d: tl.tensor,
    k_r: tl.tensor,
    k_h: tl.tensor,
    k_n: tl.tensor,
    k_d: tl.tensor,
    v_r: tl.tensor,
    v_h: tl.tensor,
    v_n: tl.tensor,
    v_d: tl.tensor,
    SIZE: tl.constexpr,
    WIDTH: tl.constexpr,
    KEYS: tl.constexpr,
    HEADS: tl.constexpr,
    LOG2: tl.constexpr,
) -> None:
    """logits[r, 0, h] = scale·q·k, logits[r, 1, h] = v_0·v (both in powers of two), and sizes = the
    L1 norm of the value averaged over heads, of some keys of a row."""
    row = tl.program_id(1).to(tl.int64)
    at, d = tl.program_id(0) * KEYS + tl.arange(0, KEYS), tl.arange(0, WIDTH)
    inside, real = at < n, d < SIZE
    query += row * q_r
    key += row * k_r
    value += row * v_r
    total = tl.zeros([KEYS, WIDTH], tl.float32)
    for start in range(0, heads, HEADS):
        h = start + tl.arange(0, HEADS)
        of = (h < heads)[:, None] & real[None, :]
        q = tl.load(query + h[:, None] * q_h + d[None, :] * q_d, of, other=0.0)
        first = tl.load(value + h[:, None] * v_h + d[None, :] * v_d, of, other=0.0)
        mask = inside[:, None, None] & of[None, :, :]
        places, entries = at[:, None, None], d[None, None, :]
        k = tl.load(
            key + places * k_n + h[None, :, None] * k_h + entries * k_d, mask, other=0.0
        ).to(tl.float32)
        v = tl.load(
            value + places * v_n + h[None, :, None] * v_h + entries * v_d, mask, other=0.0
        ).to(tl.float32)
        out = logits + (row * 2 * heads + h[None, :]) * n + at[:, None]
        there = inside[:, None] & (h < heads)[None, :]
        tl.store(out, tl.sum(k * q.to(tl.float32)[None, :, :], 2) * scale, there)
        likeness = tl.sum(v * first.to(tl.float32)[None, :, :], 2)
        tl.store(out + heads * n, likeness * LOG2, there)
        total += tl.sum(v, 1)
    tl.store(sizes + row * n + at, tl.sum(tl.abs(total / heads), 1), inside)


@triton.jit
def shares(
    logits: tl.tensor,
    heads: tl.tensor,
    n: tl.tensor,
    at: tl.tensor,
    there: tl.tensor,
    TINY: tl.constexpr,
    BLOCK: tl.constexpr,
    HEADS: tl.constexpr,
) -> tl.tensor:
    """Softmax over [CLS] and the patches that are there, mean over heads, as a distribution over
    the patches."""
    mean = tl.zeros([BLOCK], tl.float32)
    for start in range(0, heads, HEADS):
        h = start + tl.arange(0, HEADS)
        real = h < heads
        of = logits + h * n
        cls = tl.load(of, real, other=0.0)
        x = tl.load(
            of[:, None] + 1 + at[None, :], real[:, None] & there[None, :], other=float("-inf")
        )
        top = tl.maximum(tl.max(x, 1), cls)
        x = tl.exp2(x - top[:, None])
        total = tl.sum(x, 1) + tl.exp2(cls - top)
        mean += tl.sum(tl.where(real[:, None], x / total[:, None], 0.0), 0)
    mean = mean / heads
    return mean / tl.maximum(tl.sum(mean, 0), TINY)


@triton.jit
def highest(score: tl.tensor, usable: tl.tensor, count: tl.tensor) -> tl.tensor:
    """Which are the `count` highest scores, the first of equal ones: see `group_topk_kernel`."""
    key = sort_key(score, usable)
    threshold = reached_by(key, count)
    above, level = key > threshold, usable & (key == threshold)
    wanted = count - tl.sum(above.to(tl.int32), 0)
    return above | (level & (tl.cumsum(level.to(tl.int32), 0) <= wanted))


@triton.jit(do_not_specialize=["heads", "n", "units"])
def flow_step_kernel(
    logits: tl.tensor,
    sizes: tl.tensor,
    valid: tl.tensor,
    before: tl.tensor,
    targets: tl.tensor,
    score: tl.tensor,
    keep: tl.tensor,
    amounts: tl.tensor,
    heads: tl.tensor,
    n: tl.tensor,
    units: tl.tensor,
    root: tl.tensor,
    LAST: tl.constexpr,
    M: tl.constexpr,
    BLOCK: tl.constexpr,
    HEADS: tl.constexpr,
    TINY: tl.constexpr,
    EVEN: tl.constexpr,
) -> None:
    """Score of a row's units, and which of them go on; into `amounts`, if given, how many would be
    dropped instead. `root` is 1/√rpl."""
    row = tl.program_id(0).to(tl.int64)
    at = tl.arange(0, BLOCK)
    there = tl.load(valid + row * units + at // M, at < n - 1, other=0) != 0
    of = logits + row * 2 * heads * n
    p = shares(of, heads, n, at, there, TINY, BLOCK, HEADS)
    g = shares(of + heads * n, heads, n, at, there, TINY, BLOCK, HEADS)
    size = tl.load(sizes + row * n + 1 + at, there, other=0.0)
    new = tl.where(there, (p + g) * size, 0.0)
    if M > 1:
        new = tl.sum(tl.reshape(new, [BLOCK // M, M]), 1) / M
    unit = tl.arange(0, BLOCK // M)
    inside = unit < units
    left = tl.load(valid + row * units + unit, inside, other=0) != 0
    if before is not None:
        old = tl.load(before + row * units + unit, left, other=0.0)
        new = tl.where(left, 0.5 * old + 0.5 * new, 0.0)
    tl.store(score + row * units + unit, new, inside)
    if targets is not None:
        count = tl.sum(left.to(tl.int32), 0)
        wanted = tl.load(targets + row).to(tl.int32)
        goes_on = tl.minimum(count, wanted)
        if not LAST:
            entropy = -tl.sum(tl.where(p > 0, p * tl.log(tl.where(p > 0, p, 1.0)), 0.0), 0)
            spread = entropy / tl.log(tl.maximum(count * M, 2).to(tl.float32))
            amount = ((count - wanted) * M).to(tl.float32) * root * (1 - spread * spread) / M
            dropped = ((amount + EVEN) - EVEN).to(tl.int32)
            dropped = tl.where(count > wanted, dropped, 0)
            goes_on = tl.minimum(count, tl.maximum(count - dropped, wanted))
        if amounts is not None:
            tl.store(amounts + row, dropped)
        else:
            chosen = highest(new, left, goes_on)
            tl.store(keep + row * units + unit, chosen, inside)


@triton.jit(do_not_specialize=["rows", "units"])
def flow_choice_kernel(
    score: tl.tensor,
    valid: tl.tensor,
    targets: tl.tensor,
    amounts: tl.tensor,
    together: tl.tensor,
    keep: tl.tensor,
    rows: tl.tensor,
    units: tl.tensor,
    BLOCK: tl.constexpr,
    ROWS: tl.constexpr,
) -> None:
    """Which units of a row go on, when as many are dropped as in any row that has its number."""
    row = tl.program_id(0).to(tl.int64)
    own = tl.load(together + row)
    dropped = tl.full([], 0, tl.int32)
    for start in range(0, rows, ROWS):
        at = start + tl.arange(0, ROWS)
        like = tl.load(together + at, at < rows, other=0) == own
        amount = tl.load(amounts + at, (at < rows) & like, other=0)
        dropped = tl.maximum(dropped, tl.max(amount, 0))
    unit = tl.arange(0, BLOCK)
    inside = unit < units
    left = tl.load(valid + row * units + unit, inside, other=0) != 0
    count, wanted = tl.sum(left.to(tl.int32), 0), tl.load(targets + row).to(tl.int32)
    goes_on = tl.minimum(count, tl.maximum(count - dropped, wanted))
    chosen = highest(tl.load(score + row * units + unit, left, other=0.0), left, goes_on)
    tl.store(keep + row * units + unit, chosen, inside)
