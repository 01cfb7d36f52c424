"""The highest scores win."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from vtc import ops
from vtc.errors import VtcError
from vtc.selectors.base import Selector, selection_of
from vtc.types import Selection, Tokens


@dataclass(frozen=True)
class TopK(Selector):
    """The `counts[g]` highest scored tokens of each group, in original order, ties to the lowest
    index."""

    name: ClassVar[str] = "top_k"

    def __call__(self, tokens: Tokens, scores: Tensor | None, counts: Tensor) -> Selection:
        """Choose; raises `VtcError` on missing or NaN scores."""
        if scores is None or scores.shape != tokens.valid.shape:
            got = None if scores is None else tuple(scores.shape)
            raise VtcError(
                f"top_k got scores of shape {got}, expected {tuple(tokens.valid.shape)}: "
                f"return one score per token from the scorer"
            )
        if bool((scores.isnan() & tokens.valid).any()):
            raise VtcError(
                "top_k got NaN scores, expected numbers: a scorer divides by zero or the "
                "model produced NaN features"
            )
        keep, valid = ops.group_topk(scores, tokens.valid, counts)
        return selection_of(tokens, keep, valid, scores)
