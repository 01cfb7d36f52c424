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


def with_opposed(x: Tensor, own: Tensor, sure: Tensor, pivots: Tensor, count: int) -> Tensor:
    """`count` tokens: some that are sure, and an even share for each pivot of those opposed to it.

    Args:
        x: `[S, D]`, entries of a sequence, L2-normalized.
        own: `int64[N]`, the entries that are tokens.
        sure: `int64[K]`, which of the N stay anyway, at most `count`.
        pivots: `int64[P]`, entries, in their order.
        count: at most N.

    Returns:
        `bool[N]`, the tokens that stay.
    """
    stays = torch.zeros_like(own, dtype=torch.bool)
    stays[sure] = True
    quotas = even_quotas(count - len(sure), len(pivots))
    return stays | opposed(x[own], x[pivots], ~stays, quotas)


def even_quotas(total: int, shares: int) -> list[int]:
    """`total` in `shares` parts that differ by one at most, the first ones larger."""
    each, more = divmod(total, shares)
    return [each + (i < more) for i in range(shares)]


def largest(values: Tensor, among: Tensor, count: int) -> Tensor:
    """Indices of the largest `values [N]` at `among`, descending, at most `count` of them; ties go
    to the lowest index."""
    order = values.masked_fill(~among, float("-inf")).argsort(descending=True, stable=True)
    return order[: min(count, int(torch.count_nonzero(among)))]
