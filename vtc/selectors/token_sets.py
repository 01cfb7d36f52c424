"""Tokens that an early block looks at, and outliers of a late one (PAINT)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from vtc import ops
from vtc.dispatch import constant
from vtc.errors import OptionError
from vtc.selectors.base import Count, Selector, checked_scores
from vtc.selectors.windows import chosen
from vtc.types import Selection, Signal, Tokens


def outliers(scores: Tensor, valid: Tensor) -> Tensor:
    """How many scores of each group lie above Q3 + 1.5·(Q3 − Q1), at least one, `int64[G]` on the
    device; quartiles are interpolated linearly."""
    x = scores.double().masked_fill(~valid, float("nan"))
    low, high = x.nanquantile(0.25, dim=1), x.nanquantile(0.75, dim=1)
    bound = high + 1.5 * (high - low)
    return (valid & (x > bound[:, None])).sum(1).clamp_min(1).minimum(valid.sum(1))


@dataclass(frozen=True)
class TokenSets(Selector):
    """The ⌊share·n⌋ highest of an early block (local) and the outliers among the scores (summary).

    Args:
        early: the signal `[G, 1, N]` of local tokens.
        share: of the tokens of a group that are local; at least one token.
        sets: whether both are kept or one of them, local tokens without those in the summary.
    """

    name: ClassVar[str] = "token_sets"
    count: ClassVar[Count] = "adaptive"
    early: Signal = Signal("cls_row", (0,), label="early_row", stand_in="received_row")
    share: float = 0.25
    sets: Literal["both", "local", "summary"] = "both"

    def __post_init__(self) -> None:
        if not 0 < self.share <= 1:
            raise OptionError(f"token_sets got share={self.share}, expected one in (0, 1]")

    @property
    def needs(self) -> tuple[Signal, ...]:
        """What local tokens go by."""
        return (self.early,)

    def __call__(self, tokens: Tokens, scores: Tensor | None, counts: Tensor) -> Selection:
        """Choose; counts are ignored. Raises `VtcError` on missing or NaN scores."""
        scores, valid = checked_scores(self.name, tokens, scores), tokens.valid
        local = tuple(max(min(n, 1), int(self.share * n)) for n in tokens.lengths)
        early = tokens.signal(self.early.key)[:, 0]
        near = ops.topk_mask(early, valid, constant(local, valid.device))
        summary = ops.topk_mask(scores, valid, outliers(scores, valid))
        apart = near & ~summary
        # a group whose local tokens are all in the summary keeps those
        apart = torch.where(apart.any(1, keepdim=True), apart, near)
        mask = {"both": near | summary, "local": apart, "summary": summary}[self.sets]
        return chosen(tokens, mask, mask.sum(1).cpu(), scores)
