"""Average pooling of the projected tokens onto a coarser grid."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from vtc.methods.base import Exactness, Method
from vtc.selectors import GridPool, Selector


@dataclass(frozen=True, kw_only=True)
class AveragePool(Method):
    """Baseline: adaptive average pooling to the largest coarser grid of the same aspect within the
    budget.

    A pooled token takes the position of the cell in the middle of those it averages. The number of
    tokens is at most the budget (16 for 22 on a square grid); `report()` gives the realized one.
    """

    name: ClassVar[str] = "average_pool"
    summary: ClassVar[str] = "baseline: tokens averaged onto a coarser grid"
    count: ClassVar = "at_most"
    exactness: ClassVar[Exactness] = "restatement"
    published_positions: ClassVar = "renumber"

    def default_selector(self) -> Selector:
        """A coarser grid."""
        return GridPool()
