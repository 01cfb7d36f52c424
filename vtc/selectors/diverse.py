"""What the two selectors for diversity share: a pivot, then the token least like those chosen."""

from __future__ import annotations

from typing import Literal

from torch import Tensor

from vtc import ops
from vtc.checks import require_none
from vtc.selectors.base import checked_scores, selection_of
from vtc.types import Selection, Tokens


def diverse(
    name: str,
    objective: Literal["max_sum", "k_center"],
    tokens: Tokens,
    scores: Tensor | None,
    counts: Tensor,
) -> Selection:
    """The choice of selector `name`, from the highest scored token of each group on.

    The selection has no scores: that of the pivot says nothing about the others.

    Raises:
        VtcError: scores are missing or NaN, or features are NaN.
    """
    scores = checked_scores(name, tokens, scores)
    require_none(
        # a maximum, in which NaN stays: features are read once, and nothing of their size is made
        tokens.features.amax(-1).isnan() & tokens.valid,
        f"{name} got NaN features, expected numbers: load the model in float32 or bfloat16",
    )
    pivot, _ = ops.group_topk(scores, tokens.valid, counts.clamp_max(1))
    if not pivot.shape[1]:
        return selection_of(tokens, pivot, pivot.bool())
    keep, valid = ops.greedy_diverse(tokens.features, tokens.valid, counts, pivot[:, 0], objective)
    return selection_of(tokens, keep, valid)
