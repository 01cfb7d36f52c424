"""Tokens that matter, and of the others those that are left when near copies go (VisPruner)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn.functional import normalize

from vtc.dispatch import constant
from vtc.errors import OptionError
from vtc.selectors.base import checked_scores
from vtc.selectors.coverage import Comparing
from vtc.selectors.windows import chosen
from vtc.types import Selection, Tokens

# how many go at a time (official code)
_STEP = 8


@dataclass(frozen=True)
class Distinct(Comparing):
    """⌊share·T⌋ tokens of the highest scores, and T − that of the rest by removing near copies.

    The rest, highest scores first, is split into its even and odd items. Of the even ones the 8
    most like any odd one go (at the end as many as are too many); what is left of them, most alike
    first, then the odd ones are the next list.

    Args:
        share: of the tokens kept by their scores.
    """

    name: ClassVar[str] = "distinct"
    share: float = 0.5

    def __post_init__(self) -> None:
        if not 0 <= self.share <= 1:
            raise OptionError(f"distinct got share={self.share}, expected one in [0, 1]")

    def __call__(self, tokens: Tokens, scores: Tensor | None, counts: Tensor) -> Selection:
        """Choose; raises `VtcError` on missing or NaN scores or vectors."""
        scores, x = checked_scores(self.name, tokens, scores), self.vectors(tokens)
        mask = torch.zeros_like(tokens.valid)
        asked = list(zip(tokens.lengths, counts.tolist(), strict=True))
        for n, count in dict.fromkeys(asked):
            # groups of one size and count are one batch
            members = constant(
                tuple(g for g, other in enumerate(asked) if other == (n, count)), mask.device
            )
            order = scores[members, :n].argsort(dim=1, descending=True, stable=True)
            important = int(self.share * count)
            unit = normalize(x[members, :n].float(), dim=-1)
            rest = _without_copies(unit, order[:, important:], count - important)
            kept = torch.cat([order[:, :important], rest], 1)
            mask[members] = mask[members].scatter(1, kept, True)
        return chosen(tokens, mask, counts, scores)


def _without_copies(x: Tensor, items: Tensor, wanted: int) -> Tensor:
    """`wanted` of the items `int64[B, R]`, compared by their unit vectors `[B, N, D]`."""
    batch = torch.arange(len(items), device=items.device)[:, None]
    while (excess := items.shape[1] - wanted) > 0:
        even, odd = items[:, ::2], items[:, 1::2]
        if not odd.shape[1]:
            return items[:, :wanted]
        # multiplied anew in each round, as published: looked up in one map of all tokens, cosines
        # round otherwise, and one swap decides who is even in all later rounds
        left = x[batch, items]
        nearest = (left[:, ::2] @ left[:, 1::2].mT).amax(-1)
        order = nearest.argsort(dim=1, descending=True, stable=True)
        items = torch.cat([even.gather(1, order[:, min(_STEP, excess) :]), odd], 1)
    return items
