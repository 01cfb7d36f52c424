"""Clusters become their means, at their centers; which tokens are clustered where some are dropped
(SparseVLM)."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from vtc.selectors.density_peaks import density_peaks
from vtc.sites import LayerCut


def with_clusters(
    cut: LayerCut, clusters: Iterable[tuple[int, Tensor, Tensor]], sized: bool = False
) -> LayerCut:
    """A cut in which clusters go on as the means over their members besides.

    Args:
        cut: `bool[G, N]` and its like, of all groups.
        clusters: a group g, `int64[n]`, which of its tokens are clustered, and `int64[n]`, which of
            these n is the center of each: itself for centers, −1 for tokens that are gone.
        sized: whether later layers are told how many tokens each stands for.
    """
    keep, into, weight, size = (x.clone() for x in (cut.keep, cut.into, cut.weight, cut.weight))
    for g, at, center in clusters:
        there, owner = center >= 0, center.clamp_min(0)
        count = owner[there].bincount(minlength=len(at)).float()
        keep[g, at] = center == torch.arange(len(at), device=at.device)
        into[g, at] = at[owner]
        weight[g, at] = torch.where(there, 1 / count[owner], 0)
        size[g, at] = count.clamp_min(1)
    return LayerCut(keep, into, weight, size if sized else None)


def recycled(
    features: Tensor, scores: Tensor | None, kept: Tensor, valid: Tensor, clusters: Sequence[int]
) -> LayerCut:
    """What some of the tokens that are not kept become: the highest scored of them are clustered by
    density peaks, as many clusters as there are neighbors to a density.

    Args:
        features: `[G, N, D]`, what is compared.
        scores: `float32[G, N]`; None: all are clustered.
        kept: `bool[G, N]`.
        valid: `bool[G, N]`.
        clusters: for each group, see `cluster_count`.
    """
    found = []
    for g, count in enumerate(clusters):
        if not count:
            continue
        (gone,) = (valid[g] & ~kept[g]).nonzero(as_tuple=True)
        if scores is not None:
            order = scores[g, gone].argsort(descending=True, stable=True)
            gone = gone[order[: recyclable(len(gone))]].sort().values
        centers, belongs = density_peaks(features[g, gone], count, count)
        found.append((g, gone, centers[belongs]))
    return with_clusters(LayerCut.alone(kept), found)


def recyclable(dropped: int) -> int:
    """Of so many dropped tokens, those that are recycled."""
    return min(int(0.3 * dropped) + 1, dropped)


def cluster_count(n: int, count: int) -> int:
    """How many of `count` places go to clusters when `n` tokens are left, so that as many remain as
    published; half of them where those would leave no place for a token as it is."""
    if count >= n:
        return 0
    for kept in range(count - 1, 0, -1):
        if kept + recyclable(n - kept) // 10 + 1 == count:
            return count - kept
    return count // 2
