"""Mergers: which tokens become part of which slot, and how much of each, as `Selection.merge`."""

from vtc.mergers.contextual import Contextual
from vtc.mergers.nearest import means, nearest
from vtc.mergers.neighbors import Neighbors

__all__ = ["Contextual", "Neighbors", "means", "nearest"]
