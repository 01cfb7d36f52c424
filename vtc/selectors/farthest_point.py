"""The token farthest from its nearest chosen one, again and again: greedy k-center."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from vtc.selectors.base import Selector
from vtc.selectors.diverse import diverse
from vtc.types import Selection, Tokens


@dataclass(frozen=True)
class FarthestPoint(Selector):
    """Farthest-point sampling of L2-normalized features, seeded by the highest scored token.

    S = max_{c chosen} x·x_c; the next is argmin S. This is the greedy 2-approximation of k-center.
    """

    name: ClassVar[str] = "farthest_point"

    def __call__(self, tokens: Tokens, scores: Tensor | None, counts: Tensor) -> Selection:
        """Choose; raises `VtcError` on missing or NaN scores or features."""
        return diverse(self.name, "k_center", tokens, scores, counts)
