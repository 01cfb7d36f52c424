"""The highest scores win."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from vtc import ops
from vtc.selectors.base import Selector, checked_scores, selection_of
from vtc.types import Selection, Tokens


@dataclass(frozen=True)
class TopK(Selector):
    """The `counts[g]` highest scored tokens of each group, in original order, ties to the lowest
    index."""

    name: ClassVar[str] = "top_k"

    def __call__(self, tokens: Tokens, scores: Tensor | None, counts: Tensor) -> Selection:
        """Choose; raises `VtcError` on missing or NaN scores."""
        scores = checked_scores(self.name, tokens, scores)
        keep, valid = ops.group_topk(scores, tokens.valid, counts)
        return selection_of(tokens, keep, valid, scores)
