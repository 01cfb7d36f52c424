"""Selectors: (tokens, scores, counts) -> Selection."""

from vtc.selectors.anchors import Anchors
from vtc.selectors.base import Count, Selector, mask_over, selection_of
from vtc.selectors.by_row import ByRow
from vtc.selectors.coverage import Coverage
from vtc.selectors.crops import CropQuotas
from vtc.selectors.distinct import Distinct
from vtc.selectors.dpp_map import DppMap
from vtc.selectors.farthest_point import FarthestPoint
from vtc.selectors.grid_pool import GridPool
from vtc.selectors.holistic import Holistic
from vtc.selectors.max_sum import MaxSum
from vtc.selectors.text_coverage import TextCoverage
from vtc.selectors.token_sets import TokenSets
from vtc.selectors.top_k import TopK
from vtc.selectors.uniform import UniformStride
from vtc.selectors.windows import EvenWindows

SELECTORS: dict[str, type[Selector]] = {
    s.name: s
    for s in (TopK, UniformStride, GridPool, MaxSum, FarthestPoint, Coverage, DppMap, EvenWindows)
}

__all__ = [
    "SELECTORS",
    "Anchors",
    "ByRow",
    "Count",
    "Coverage",
    "CropQuotas",
    "Distinct",
    "DppMap",
    "EvenWindows",
    "FarthestPoint",
    "GridPool",
    "Holistic",
    "MaxSum",
    "Selector",
    "TextCoverage",
    "TokenSets",
    "TopK",
    "UniformStride",
    "mask_over",
    "selection_of",
]
