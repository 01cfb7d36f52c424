"""The tensor operations behind scorers, selectors and the runtime: a plain-torch reference each.

The reference is the specification and the CPU path. A Triton kernel that equals it may take its
place on a GPU; which one ran is said in `report()`.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from vtc.dispatch import accelerated, constant

# numbers in the largest attention map formed at once: 64 MiB of float32
_MAP = 2**24
# of `greedy_map`: nothing is left of a token below this share of its own diagonal for each choice
# so far. 4 eps of float32: of kernels of 577 and 1,200 tokens whose rank was exhausted (8 to 640
# choices, flat and steep spectra) rounding had left at most 3.8 eps a choice
SPENT = 2.0**-21
# of `greedy_map`: tokens whose product is at least this share of the square of either are copies.
# 32 eps: more than the order of some thousand terms makes of a product, less than bfloat16 resolves
EQUAL = 1 - 2.0**-18


@accelerated
def attention_rows(q: Tensor, k: Tensor, scale: float, valid: Tensor | None = None) -> Tensor:
    """Softmax attention of a few queries to all keys, averaged over heads; N×N is never formed.

    Args:
        q: `[B, H, R, d]`, the R query rows wanted (one for [CLS]).
        k: `[B, H, N, d]`.
        scale: what q·k is multiplied by.
        valid: `bool[B, N]`, keys that may be attended to; None: all.

    Returns:
        `float32[B, R, N]`; each row sums to 1 over the valid keys.
    """
    logits = torch.einsum("bhrd,bhnd->bhrn", q.float(), k.float()) * scale
    if valid is not None:
        logits = logits.masked_fill(~valid[:, None, None], float("-inf"))
    return logits.softmax(-1).mean(1)


def mean_query_row(q: Tensor, k: Tensor, scale: float, valid: Tensor) -> Tensor:
    """Attention of the mean query to all keys, averaged over heads: what stands in for a [CLS].

    Args:
        q: `[B, H, N, d]`; its mean is taken over the valid entries.
        k: `[B, H, N, d]`.
        scale: what q·k is multiplied by.
        valid: `bool[B, N]`.

    Returns:
        `float32[B, N]`; a row sums to 1, 0 where not valid.
    """
    at = valid[:, None, :, None]
    total = q.float().masked_fill(~at, 0).sum(2, keepdim=True)
    mean = total / at.sum(2, keepdim=True).clamp_min(1)
    return attention_rows(mean, k, scale, valid)[:, 0].masked_fill(~valid, 0)


@accelerated
def attention_received(q: Tensor, k: Tensor, scale: float, valid: Tensor) -> Tensor:
    """Attention that each key receives, averaged over heads and valid queries; N×N is formed in
    parts only.

    Args:
        q: `[B, H, N, d]`.
        k: `[B, H, N, d]`.
        scale: what q·k is multiplied by.
        valid: `bool[B, N]`.

    Returns:
        `float32[B, N]`; a row sums to 1, 0 where not valid.
    """
    batch, heads, n, _ = k.shape
    received = torch.zeros(batch, n, device=k.device)
    for part in torch.arange(n, device=k.device).split(max(1, _MAP // max(batch * heads * n, 1))):
        rows = attention_rows(q[:, :, part], k, scale, valid)  # [B, R, N]
        # `where`, not a product: the row of a padding query may be NaN
        received += torch.where(valid[:, part, None], rows, 0).sum(1)
    return (received / valid.sum(-1, keepdim=True).clamp_min(1)).masked_fill(~valid, 0)


def causal_rows(
    q: Tensor,
    k: Tensor,
    scale: float,
    mask: Tensor,
    rows: Tensor,
    held: Tensor | None = None,
    turned: Tensor | None = None,
) -> Tensor:
    """Causal attention of some entries to all keys, head by head: the mean over these entries.

    Their maps are formed in parts only.

    Args:
        q: `[B, H, S, d]`.
        k: `[B, H, T, d]`, T ≥ S: the last S keys are those of the entries.
        scale: what q·k is multiplied by.
        mask: `bool[B, S]`, False on padding, which nothing attends to.
        rows: `bool[B, S]`, the entries that attend.
        held: `bool[B, T − S]`, which keys before those may be attended to; None: all.
        turned: `[B, S, e]`: attention of entry i to entry j is divided by turned_i·turned_j.

    Returns:
        `float32[B, H, T]`; zeros where a batch row has no such entries.
    """
    past = k.shape[2] - q.shape[2]
    out = torch.zeros(k.shape[:3], device=q.device)
    for b in range(len(q)):
        keys, at = k[b].float(), rows[b].nonzero()[:, 0]
        key_at = torch.arange(keys.shape[1], device=q.device) - past
        before = mask.new_ones(past) if held is None else held[b]
        there = torch.cat([before, mask[b]])
        for part in at.split(max(1, _MAP // keys.shape[:2].numel())):
            logits = torch.einsum("hrd,htd->hrt", q[b][:, part].float(), keys) * scale
            visible = there & (key_at <= part[:, None])
            weights = logits.masked_fill(~visible, float("-inf")).softmax(-1)
            if turned is not None:
                x = turned[b].float()
                weights[..., past:] /= x[part] @ x.T
            out[b] += weights.sum(1)
    return out / rows.sum(-1).clamp_min(1)[:, None, None]


@accelerated
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
    entries.

    Only the maps of the entries that can see one of the others are formed: an entry before all of
    them has no mass there.

    Args:
        q, k, scale, mask, rows, held: as in `causal_rows`.
        onto: `bool[B, S]`, the entries attended to.

    Returns:
        `float32[B]`; 0 where a batch row has no such entries. NaN where one of them that is behind
        one of the others sees nothing: none does whose own key is valid, as `rows` within `mask`.
    """
    seeing, past = rows & (onto.cumsum(-1) > 0), k.shape[2] - q.shape[2]
    shares = causal_rows(q, k, scale, mask, seeing, held).mean(1)[:, past:]
    mass = shares.masked_fill(~onto, 0).sum(-1) * seeing.sum(-1)
    return mass / rows.sum(-1).clamp_min(1)


def massive_activation(hidden: Tensor, dims: tuple[int, ...]) -> Tensor:
    """How far an entry of the residual stream stands out in some dimensions: max over them of
    |x_d| / sqrt(mean(x²) + 1e-6), without any norm's weights.

    Args:
        hidden: `[B, S, D]`.
        dims: at least one, in 0..D−1.

    Returns:
        `float32[B, S]`.
    """
    x = hidden.float()
    size = (x.square().mean(-1) + 1e-6).sqrt()
    return torch.stack([x[..., d] for d in dims], -1).abs().amax(-1) / size


@accelerated
def group_topk(scores: Tensor, valid: Tensor, counts: Tensor) -> tuple[Tensor, Tensor]:
    """The `counts[g]` highest scores of each group, as ascending indices; ties go to the lowest
    index.

    Args:
        scores: `[G, N]`.
        valid: `bool[G, N]`; an invalid token is never chosen.
        counts: `int64[G]` on the CPU, at most the valid tokens of the group.

    Returns:
        `keep`, `int64[G, K]` with K = max(counts), 0 where not valid, and `bool[G, K]`.
    """
    width = int(counts.max()) if len(counts) else 0
    by_score = scores.float().argsort(dim=-1, descending=True, stable=True)
    # a second stable sort puts invalid tokens last whatever their score, -inf included
    by_score = by_score.gather(1, (~valid).gather(1, by_score).int().argsort(dim=-1, stable=True))
    rank = torch.arange(width, device=scores.device)
    keep_valid = rank < constant(tuple(counts.tolist()), scores.device)[:, None]
    index = by_score[:, :width].masked_fill(~keep_valid, scores.shape[1])
    return index.sort(-1).values.masked_fill(~keep_valid, 0), keep_valid


def topk_mask(scores: Tensor, valid: Tensor, counts: Tensor) -> Tensor:
    """What `group_topk` chooses, as `bool[G, N]`, by counts that the host need not know.

    Args:
        scores: `[G, N]`.
        valid: `bool[G, N]`.
        counts: `int64[G]` on the device of the scores.
    """
    by_score = scores.float().argsort(dim=-1, descending=True, stable=True)
    by_score = by_score.gather(1, (~valid).gather(1, by_score).int().argsort(dim=-1, stable=True))
    chosen = torch.arange(valid.shape[1], device=valid.device) < counts[:, None]
    return torch.zeros_like(valid).scatter(1, by_score, chosen) & valid


@accelerated
def greedy_diverse(
    features: Tensor,
    valid: Tensor,
    counts: Tensor,
    pivot: Tensor,
    objective: Literal["max_sum", "k_center"],
) -> tuple[Tensor, Tensor]:
    """From a pivot on, again and again the token least similar to those chosen; ties go to the
    lowest index.

    Similar is meant by cosine, summed over the chosen (`"max_sum"`) or to the nearest of them
    (`"k_center"`, farthest-point sampling). O(N·K·D) in float32; N×N is never formed. A token of
    zeros has similarity 0 to all.

    Args:
        features: `[G, N, D]`.
        valid: `bool[G, N]`; an invalid token is never chosen.
        counts: `int64[G]` on the CPU, at most the valid tokens of the group.
        pivot: `int64[G]`, the first choice of each group.
        objective: how the similarities to the chosen are put together.

    Returns:
        `keep`, `int64[G, K]` with K = max(counts), ascending, 0 where not valid, and `bool[G, K]`.
    """
    width = int(counts.max()) if len(counts) else 0
    x = torch.nn.functional.normalize(
        features.float().masked_fill(~valid[..., None], 0), dim=-1
    )  # [G, N, D]
    groups, taken = torch.arange(len(x), device=x.device), ~valid
    chosen, likeness = [pivot], torch.full(valid.shape, float("-inf"), device=x.device)
    for i in range(1, width):
        taken = taken.scatter(1, chosen[-1][:, None], True)
        # a product and a sum, not a matrix product: that one may round equal tokens (still frames
        # of a video) and rows of other batches differently, and which is lowest would be chance
        cosine = (x * x[groups, chosen[-1]][:, None]).sum(-1)
        if objective == "k_center":
            likeness = torch.maximum(likeness, cosine)
        else:
            likeness = cosine if i == 1 else likeness + cosine
        chosen.append(likeness.masked_fill(taken, float("inf")).argmin(-1))
    keep_valid = (
        torch.arange(width, device=x.device) < constant(tuple(counts.tolist()), x.device)[:, None]
    )
    if not width:
        return keep_valid.long(), keep_valid
    index = torch.stack(chosen, 1).masked_fill(~keep_valid, valid.shape[1])
    return index.sort(-1).values.masked_fill(~keep_valid, 0), keep_valid


@accelerated
def compact(x: Tensor, index: Tensor, valid: Tensor) -> Tensor:
    """Gather rows: `out[b, l] = x[b, index[b, l]]`, zeros where not valid.

    Args:
        x: `[B, S, ...]`.
        index: `int64[B, L]`.
        valid: `bool[B, L]`.

    Returns:
        `[B, L, ...]`, contiguous, in the dtype of `x`.
    """
    rows = torch.arange(len(x), device=x.device)[:, None]
    return x[rows, index].masked_fill(~valid.view(*valid.shape, *[1] * (x.dim() - 2)), 0)


@accelerated
def greedy_map(kernel: Tensor, valid: Tensor, counts: Tensor) -> tuple[Tensor, Tensor]:
    """Greedy MAP inference of a determinantal point process: again and again the token that adds
    most to the determinant of the chosen ones' kernel; ties go to the lowest index.

    By the incremental Cholesky factor of Chen et al., "Fast Greedy MAP Inference for Determinantal
    Point Process", algorithm 1, as CDPruner runs it; O(N·K²) in float32. Two rules keep rounding,
    which is another on each device, from deciding:

    - Copies (K_ij ≥ `EQUAL`·max(K_ii, K_jj)) are one choice: of those left the lowest index is
      taken, and nothing is left of the others.
    - What is left of a token, as a share of its own diagonal, counts as 0 up to `SPENT` for each
      choice so far (all tokens once the rank is exhausted): the published code divides by the root
      of what rounding left. Once nothing is left of any, the lowest index not yet taken is next.

    Args:
        kernel: `[G, N, N]`, symmetric positive semi-definite (`diag(relevance)·similarity·
            diag(relevance)` in CDPruner).
        valid: `bool[G, N]`; an invalid token is never chosen and its entries are not looked at.
        counts: `int64[G]` on the CPU, at most the valid tokens of the group.

    Returns:
        `keep`, `int64[G, K]` with K = max(counts), ascending, 0 where not valid, and `bool[G, K]`.
    """
    width, n = int(counts.max()) if len(counts) else 0, valid.shape[1]
    kernel = kernel.float().masked_fill(~(valid[:, None] & valid[..., None]), 0)
    diagonal = kernel.diagonal(dim1=-2, dim2=-1)
    groups, index = (torch.arange(size, device=kernel.device) for size in valid.shape)
    taken, left = ~valid, diagonal
    factor, chosen = kernel.new_zeros(len(kernel), n, width), []  # [G, N, K]
    for i in range(width):
        j = left.masked_fill(taken, float("-inf")).argmax(-1)
        row, own = kernel[groups, j], diagonal.gather(1, j[:, None])
        copies = ~taken & (row >= EQUAL * torch.maximum(diagonal, own))
        pick = torch.where(copies, index, j[:, None]).amin(-1)
        known = (factor[..., :i] * factor[groups, j, None, :i]).sum(-1)
        pivot = left.gather(1, j[:, None])
        row = torch.where(pivot > 0, (row - known) / pivot.sqrt(), 0)
        left = left - row * row
        left = left.masked_fill(copies | (left <= SPENT * (i + 1) * diagonal), 0)
        factor[..., i], taken = row, taken.scatter(1, pick[:, None], True)
        chosen.append(pick)
    keep_valid = (
        torch.arange(width, device=valid.device)
        < constant(tuple(counts.tolist()), valid.device)[:, None]
    )
    if not width:
        return keep_valid.long(), keep_valid
    index = torch.stack(chosen, 1).masked_fill(~keep_valid, n)
    return index.sort(-1).values.masked_fill(~keep_valid, 0), keep_valid


@accelerated
def packed_index(used: Tensor, width: int) -> tuple[Tensor, Tensor]:
    """Where rows are True, as ascending indices against the right edge of `width` columns; of a row
    with more entries the last ones.

    Args:
        used: `bool[B, T]`.
        width: columns of the result.

    Returns:
        `int64[B, width]`, 0 on the padding at the left, and `bool[B, width]`, False there.
    """
    rows, length = used.shape
    index = torch.where(used, torch.arange(length, device=used.device), -1).sort(-1).values
    index = index[:, max(0, length - width) :]
    index = torch.cat([index.new_full((rows, width - index.shape[1]), -1), index], 1)
    return index.clamp_min(0), index >= 0


@accelerated
def group_merge(x: Tensor, slot: Tensor, token: Tensor, weight: Tensor, slots: int) -> Tensor:
    """Weighted sums of the tokens of each group: `out[g, slot] += weight · x[g, token]` over the
    pairs of a sparse triple, as in `Selection.merge`; zeros in slots that no pair names.

    Args:
        x: `[G, N, ...]`.
        slot: `int64[G, P]`, in 0..slots−1.
        token: `int64[G, P]`, in 0..N−1.
        weight: `[G, P]`; a pair of weight 0 is padding, whatever its token holds.
        slots: S, how many sums each group has.

    Returns:
        `[G, S, ...]` in the dtype of `x`, summed in float32.
    """
    group = torch.arange(len(x), device=x.device)[:, None].expand_as(slot)
    weight = weight.float().view(*weight.shape, *[1] * (x.dim() - 2))
    # `where`, not a product: a padding pair must not carry a NaN of its token
    terms = torch.where(weight != 0, x[group, token].float() * weight, 0)  # [G, P, ...]
    sums = torch.zeros(len(x), slots, *x.shape[2:], device=x.device)
    return sums.index_put((group, slot), terms, accumulate=True).to(x.dtype)
