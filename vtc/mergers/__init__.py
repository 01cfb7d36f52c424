"""Mergers: which tokens become part of which slot, and how much of each, as `Selection.merge`."""

from vtc.mergers.clusters import with_clusters
from vtc.mergers.contextual import Contextual
from vtc.mergers.nearest import means, nearest
from vtc.mergers.neighbors import Neighbors
from vtc.mergers.pairs import merged_pairs

__all__ = ["Contextual", "Neighbors", "means", "merged_pairs", "nearest", "with_clusters"]
