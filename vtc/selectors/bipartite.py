"""Bipartite matching of alternating tokens (ToMe)."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import normalize

from vtc import ops


def bipartite_matches(metric: Tensor, valid: Tensor, amounts: Tensor) -> Tensor:
    """Every other token, from the first on, looks for the most similar of those between them; the
    most similar pairs become one.

    Args:
        metric: `[R, U, D]`, compared by cosine.
        valid: `bool[R, U]`; only valid tokens are counted off and compared.
        amounts: `int64[R]`, pairs wanted; at most half of a row's tokens can be had.

    Returns:
        `int64[R, U]`: the token that each becomes part of; itself for all others. Of equally
        similar ones the lowest index.
    """
    x = normalize(metric.float().masked_fill(~valid[..., None], 0), dim=-1)
    number = valid.long().cumsum(-1) - 1
    looking, between = valid & (number % 2 == 0), valid & (number % 2 == 1)
    like = (x @ x.transpose(1, 2)).masked_fill(~between[:, None], float("-inf"))  # [R, U, U]
    best, partner = like.max(-1)
    able = looking & between.any(-1, keepdim=True)
    possible = torch.minimum(amounts.to(valid.device), able.sum(-1))
    chosen = ops.topk_mask(best.masked_fill(~able, float("-inf")), able, possible)
    place = torch.arange(valid.shape[1], device=valid.device).expand_as(partner)
    return torch.where(chosen, partner, place)


def most_pairs(counts: Tensor) -> Tensor:
    """Pairs that can be had of rows of so many tokens."""
    return torch.where(counts > 1, (counts + 1) // 2, 0)
