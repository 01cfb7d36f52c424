"""Pivots, and for each of them the tokens least like it that are not taken yet."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def opposed(x: Tensor, pivots: Tensor, among: Tensor, quotas: Sequence[int]) -> Tensor:
    """For one pivot after the other, the tokens of lowest cosine similarity to it; ties go to the
    lowest index.

    Args:
        x: `[N, D]`, L2-normalized.
        pivots: `[P, D]`, L2-normalized, in their order.
        among: `bool[N]`, the tokens that may be taken.
        quotas: how many each pivot takes, at most as many as there are in all.

    Returns:
        `bool[N]`, the tokens taken.
    """
    left = among.clone()
    for pivot, quota in zip(pivots, quotas, strict=True):
        # a product and a sum: what is lowest must not depend on the size of a batch
        cosine = (x * pivot).sum(-1).masked_fill(~left, float("inf"))
        left[cosine.argsort(stable=True)[:quota]] = False
    return among & ~left


def even_quotas(total: int, shares: int) -> list[int]:
    """`total` in `shares` parts that differ by one at most, the first ones larger."""
    each, more = divmod(total, shares)
    return [each + (i < more) for i in range(shares)]


def largest(values: Tensor, among: Tensor, count: int) -> Tensor:
    """Indices of the largest `values [N]` at `among`, descending, at most `count` of them; ties go
    to the lowest index."""
    order = values.masked_fill(~among, float("-inf")).argsort(descending=True, stable=True)
    return order[: min(count, int(torch.count_nonzero(among)))]
