"""A random subset: the floor that a method has to beat."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from vtc.methods.base import Method
from vtc.scorers import RandomScores, Scorer
from vtc.selectors import Selector, TopK


@dataclass(frozen=True, kw_only=True)
class Random(Method):
    """Baseline: k tokens uniformly at random, in original order.

    Drawn from `vtc.patch(..., seed=)` and the image's pixels: the same picture gets the same
    tokens alone and in any batch, and another seed gives other tokens.
    """

    name: ClassVar[str] = "random"
    summary: ClassVar[str] = "baseline: a random subset, by seed and picture"
    published_positions: ClassVar = "keep"

    def default_scorer(self) -> Scorer:
        """Random numbers."""
        return RandomScores()

    def default_selector(self) -> Selector:
        """The highest of them."""
        return TopK()
