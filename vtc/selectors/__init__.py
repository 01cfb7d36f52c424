"""Selectors: (tokens, scores, counts) -> Selection."""

from vtc.selectors.base import Count, Selector, mask_over, selection_of
from vtc.selectors.by_row import ByRow
from vtc.selectors.coverage import Coverage
from vtc.selectors.dpp_map import DppMap
from vtc.selectors.farthest_point import FarthestPoint
from vtc.selectors.grid_pool import GridPool
from vtc.selectors.max_sum import MaxSum
from vtc.selectors.top_k import TopK
from vtc.selectors.uniform import UniformStride
from vtc.selectors.windows import EvenWindows

SELECTORS: dict[str, type[Selector]] = {
    s.name: s
    for s in (TopK, UniformStride, GridPool, MaxSum, FarthestPoint, Coverage, DppMap, EvenWindows)
}

__all__ = [
    "SELECTORS",
    "ByRow",
    "Count",
    "Coverage",
    "DppMap",
    "EvenWindows",
    "FarthestPoint",
    "GridPool",
    "MaxSum",
    "Selector",
    "TopK",
    "UniformStride",
    "mask_over",
    "selection_of",
]
