"""Clusters of bounded radius around density peaks (PACT's DBDPC)."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import normalize


def bounded_clusters(distance: Tensor, cutoff: float) -> Tensor:
    """Centers: the densest point, then again and again the densest one that is farther than
    `cutoff` from every center. So every point has a center within the cutoff, and no two centers
    are as near to each other.

    The density of a point is Σ exp(−(d/2)²) over all points; of equals the lowest index is the
    denser. This is what the published recursion gives (all points without a denser one within the
    cutoff are centers, what is near them goes, and again among the rest), whether or not it goes
    over to one by one for small rounds.

    Args:
        distance: `[N, N]`.
        cutoff: as above.

    Returns:
        `bool[N]`.
    """
    density = (-(distance / 2).square()).exp().sum(-1)
    order = density.argsort(descending=True, stable=True)
    rank = torch.empty_like(order).scatter(0, order, torch.arange(len(order), device=order.device))
    near = distance <= cutoff
    ahead = near & (rank[None] < rank[:, None])  # [N, N]: denser and within the cutoff
    left = torch.ones(len(order), dtype=torch.bool, device=order.device)
    centers = ~left
    while bool(left.any()):
        found = left & ~(ahead & left[None]).any(-1)
        centers |= found
        left &= ~(near & found[None]).any(-1) & ~found
    return centers


def centers_in_reach(distance: Tensor, important: Tensor, cutoff: float, reach: float) -> Tensor:
    """Which center every point belongs to, `int64[N]`: the nearest, a center to itself; −1 where
    none is within reach.

    Args:
        distance: `[N, N]`.
        important: `bool[N]`, the points that are clustered, one at least.
        cutoff: as above.
        reach: how far from its center a point may be.
    """
    (at,) = important.nonzero(as_tuple=True)
    center = torch.zeros_like(important)
    center[at] = bounded_clusters(distance[at][:, at], cutoff)
    nearest = distance.masked_fill(~center[None], float("inf")).min(-1)
    belongs = nearest.indices.masked_fill(nearest.values > reach, -1)
    return torch.where(center, torch.arange(len(distance), device=distance.device), belongs)


def highest_share(scores: Tensor, share: float) -> Tensor:
    """The ⌊share·N⌋ highest of `scores [N]`, one at least, `bool[N]`; ties go to the lowest
    index."""
    order = scores.argsort(descending=True, stable=True)
    found = torch.zeros_like(scores, dtype=torch.bool)
    found[order[: max(1, int(share * len(scores)))]] = True
    return found


def cosine_distances(x: Tensor) -> Tensor:
    """1 − cosine similarity of rows `[N, D]`, `float32[N, N]`, 0 of a row to itself."""
    unit = normalize(x.float(), dim=-1)
    return (1 - unit @ unit.T).clamp_min(0).fill_diagonal_(0)
