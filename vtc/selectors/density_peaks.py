"""Clusters around density peaks (DPC-kNN)."""

from __future__ import annotations

import torch
from torch import Tensor


def density_peaks(x: Tensor, clusters: int, neighbors: int) -> tuple[Tensor, Tensor]:
    """Clustering by density peaks, densities by nearest neighbors (Du et al., 2016).

    With d the Euclidean distance over √D, the density of a point is exp(−mean d²) over its
    `neighbors` nearest points, itself included; its distance to denser points is the least of
    these, of the densest the greatest of all. The `clusters` points with the largest product of
    both are centers; every other point belongs to the nearest center. Of equal densities, products
    and distances the lowest index counts as the larger, denser or nearer: published code breaks
    these ties by random noise.

    Args:
        x: `[N, D]`.
        clusters: at most N.
        neighbors: at most N are looked at.

    Returns:
        the centers, `int64[clusters]`, ascending, and for each point which of them it belongs to,
        `int64[N]`.
    """
    n, width = x.shape
    distance = _distances(x.float()) / width**0.5
    near = distance.sort(-1).values[:, : min(neighbors, n)]
    density = (-near.square().mean(-1)).exp()
    place = torch.arange(n, device=x.device)
    denser = (density[None] > density[:, None]) | (
        (density[None] == density[:, None]) & (place[None] < place[:, None])
    )
    apart = distance.masked_fill(~denser, float("inf")).amin(-1)
    apart = torch.where(denser.any(-1), apart, distance.max())
    centers = (density * apart).argsort(descending=True, stable=True)[:clusters].sort().values
    belongs = distance[:, centers].argmin(-1)
    belongs[centers] = torch.arange(len(centers), device=x.device)
    return centers, belongs


def _distances(x: Tensor) -> Tensor:
    """Euclidean, without the cancellation of a matrix product."""
    return torch.cdist(x, x, compute_mode="donot_use_mm_for_euclid_dist")
