"""The token with the lowest summed cosine similarity to those chosen, again and again."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from vtc.selectors.base import Selector
from vtc.selectors.diverse import diverse
from vtc.types import Selection, Tokens


@dataclass(frozen=True)
class MaxSum(Selector):
    """Max-sum diversification of L2-normalized features, seeded by the highest scored token.

    S = Σ_{c chosen} x·x_c; the next is argmin S. Outliers are favored, and near-duplicates are not
    forbidden: a neighbor of an extreme is taken before the gap between two extremes is filled.
    """

    name: ClassVar[str] = "max_sum"

    def __call__(self, tokens: Tokens, scores: Tensor | None, counts: Tensor) -> Selection:
        """Choose; raises `VtcError` on missing or NaN scores or features."""
        return diverse(self.name, "max_sum", tokens, scores, counts)
