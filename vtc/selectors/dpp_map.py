"""A subset that is both relevant and diverse: greedy MAP of a determinantal point process."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from vtc import ops
from vtc.checks import require_none
from vtc.selectors.base import Selector, checked_scores, selection_of
from vtc.selectors.coverage import cosines
from vtc.types import Selection, Tokens

# keeps the least relevant token's row of the kernel from vanishing (CDPruner's official code)
_FLOOR = 1e-6


@dataclass(frozen=True)
class DppMap(Selector):
    """Greedy MAP with the kernel K = diag(r)·S·diag(r): S cosines of tokens in the LLM's embedding
    space, r the scores brought to (0, 1] by (s − min + 1e-6)/(max − min) within the group.

    Args:
        together: whether min and max are those of all groups of the call.
    """

    name: ClassVar[str] = "dpp_map"
    together: bool = False

    def __call__(self, tokens: Tokens, scores: Tensor | None, counts: Tensor) -> Selection:
        """Choose; raises `VtcError` on missing or NaN scores or features."""
        scores = checked_scores(self.name, tokens, scores)
        require_none(
            tokens.features.isnan().any(-1) & tokens.valid,
            f"{self.name} got NaN features, expected numbers: load the model in float32 or "
            "bfloat16",
        )
        r = relevance(scores, tokens.valid, self.together)
        kernel = r[:, :, None] * cosines(tokens.features, tokens.valid) * r[:, None]
        keep, valid = ops.greedy_map(kernel, tokens.valid, counts)
        return selection_of(tokens, keep, valid, scores)


def relevance(scores: Tensor, valid: Tensor, together: bool = False) -> Tensor:
    """Scores `[G, N]` brought to (0, 1], of a group or of all; equal ones all become 1."""
    low = scores.masked_fill(~valid, float("inf")).amin(-1, keepdim=True)
    high = scores.masked_fill(~valid, float("-inf")).amax(-1, keepdim=True)
    if together and len(scores):
        low, high = low.amin(), high.amax()
    span = high - low
    scaled = (scores - low + _FLOOR) / span.clamp_min(_FLOOR)
    return (scaled if together else scaled.where(span > 0, 1)).masked_fill(~valid, 0)
