"""Selectors: (tokens, scores, counts) -> Selection."""

from vtc.selectors.base import Count, Selector, selection_of
from vtc.selectors.grid_pool import GridPool
from vtc.selectors.top_k import TopK
from vtc.selectors.uniform import UniformStride

SELECTORS: dict[str, type[Selector]] = {s.name: s for s in (TopK, UniformStride, GridPool)}

__all__ = ["SELECTORS", "Count", "GridPool", "Selector", "TopK", "UniformStride", "selection_of"]
