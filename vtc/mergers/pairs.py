"""The most similar pairs become one, weighed by what each stands for (ToMe)."""

from __future__ import annotations

import torch
from torch import Tensor

from vtc.selectors.bipartite import bipartite_matches, most_pairs


def merged_pairs(
    metric: Tensor, valid: Tensor, amounts: Tensor, size: Tensor, counts: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Merge so many pairs of each row; where that is more than half of its tokens, what is left is
    matched again.

    Args:
        metric: `[R, U, D]`, compared by cosine.
        valid: `bool[R, U]`.
        amounts: `int64[R]` on the CPU, pairs; less than a row has tokens.
        size: `float[R, U]`, how many tokens each stands for.
        counts: `int64[R]` on the CPU, how many tokens of each row are valid; nothing is read off
            the device for it.

    Returns:
        which stay, `bool[R, U]`; the token that each takes part in, `int64[R, U]`; with which
        weight, `float[R, U]`, those of one token 1 in sum, 0 on padding; and the sizes of those
        that stay, `float[R, U]`, 1 elsewhere.
    """
    keep = valid
    place = torch.arange(keep.shape[1], device=keep.device).expand(keep.shape)
    into = place
    while bool(amounts.any()):
        found = bipartite_matches(metric, keep, amounts)
        merged = keep & (found != place)
        keep, into = keep & ~merged, found.gather(1, into)
        done = torch.minimum(amounts, most_pairs(counts))
        amounts, counts = amounts - done, counts - done
    total = torch.zeros_like(size).scatter_add(1, into, size.masked_fill(~valid, 0))
    weight = (size / total.gather(1, into).clamp_min(1)).masked_fill(~valid, 0)
    return keep, into, weight, torch.where(keep, total, 1)
