"""Outliers take in what is like them, and one token takes in the others (PruMerge)."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn.functional import normalize

from vtc import ops
from vtc.errors import OptionError
from vtc.selectors.base import Count, Selector, checked_scores
from vtc.selectors.token_sets import outliers
from vtc.selectors.windows import chosen
from vtc.types import Selection, Signal, Tokens

_FEATURES = Signal("encoder_features", ends_at_tap=True)


@dataclass(frozen=True)
class Neighbors(Selector):
    """As many tokens of the highest scores as there are outliers among these. Each becomes itself
    plus the sum of score times token over the `nearest` others whose keys are most like its own;
    one more, behind, is that sum over all that are dropped.

    Args:
        nearest: others that a kept token takes in.
        stride: whether tokens at 0, s, 2s, ... are kept too, s = ⌊⌊n/k⌋/3⌋ (at least 1) for k
            outliers of n tokens.
        metric: the signal whose vectors are compared by cosine.
    """

    name: ClassVar[str] = "neighbors"
    count: ClassVar[Count] = "adaptive"
    nearest: int = 32
    stride: bool = False
    metric: Signal = Signal("keys", (-1,))

    def __post_init__(self) -> None:
        if self.nearest < 0:
            raise OptionError(f"neighbors got nearest={self.nearest}, expected at least 0")

    @property
    def needs(self) -> tuple[Signal, ...]:
        """What is compared and what is summed."""
        return (self.metric, _FEATURES)

    def __call__(self, tokens: Tokens, scores: Tensor | None, counts: Tensor) -> Selection:
        """Choose and merge; counts are ignored. Raises `VtcError` on missing or NaN scores."""
        scores, valid = checked_scores(self.name, tokens, scores), tokens.valid
        k = outliers(scores, valid)
        mask = ops.topk_mask(scores, valid, k)
        place = torch.arange(valid.shape[1], device=valid.device)
        if self.stride:
            step = (valid.sum(1) // k.clamp_min(1) // 3).clamp_min(1)[:, None]
            # the official range ends before the last token
            mask = mask | ((place % step == 0) & (place < valid.sum(1, keepdim=True) - 1) & valid)
        selection = chosen(tokens, mask, mask.sum(1).cpu(), scores)
        return self._merged(tokens, selection, mask, scores.masked_fill(~valid, 0))

    def _merged(
        self, tokens: Tokens, selection: Selection, mask: Tensor, scores: Tensor
    ) -> Selection:
        keep, there, valid = selection.keep, selection.valid, tokens.valid
        kept = keep.shape[1]
        keys = tokens.signal(self.metric.key).float().masked_fill(~valid[..., None], 0)
        x = normalize(keys, dim=-1)
        own = x.gather(1, keep[..., None].expand(-1, -1, x.shape[-1]))
        place = torch.arange(x.shape[1], device=x.device)
        likeness = (own @ x.mT).masked_fill(~valid[:, None], float("-inf"))
        likeness = likeness.masked_fill(place == keep[..., None], float("-inf"))
        order = likeness.argsort(dim=-1, descending=True, stable=True)[..., : self.nearest]
        weight = scores[:, None].expand_as(likeness).gather(2, order)
        weight = weight.masked_fill(likeness.gather(2, order).isinf() | ~there[..., None], 0)
        slot = torch.arange(kept, device=x.device)
        dropped = (valid & ~mask).any(1, keepdim=True)
        parts = (
            (slot.expand_as(keep), keep, there.float()),
            (slot[:, None].expand_as(order).flatten(1), order.flatten(1), weight.flatten(1)),
            (torch.full_like(valid, kept, dtype=torch.int64), place.expand_as(valid), scores),
        )
        slots, token, weights = (torch.cat(kind, 1) for kind in zip(*parts, strict=True))
        weights[:, -valid.shape[1] :].masked_fill_(mask | ~valid, 0)
        last = (valid.sum(1, keepdim=True) - 1).masked_fill(~dropped, -1)
        return replace(
            selection,
            positions=torch.cat([selection.slot_positions, last], 1),
            merge=(slots, token.masked_fill(weights == 0, 0), weights),
            merged="encoder",
        )
