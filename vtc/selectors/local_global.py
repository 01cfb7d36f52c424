"""Half of what is kept from windows of the picture by an early block, half from anywhere by a late
one; what is dropped is merged into what is most like it (VScan)."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn.functional import normalize

from vtc import ops
from vtc.dispatch import constant
from vtc.selectors.base import Count, Selector, checked_scores
from vtc.selectors.windows import quotas, squares, top_in_windows, window_sizes
from vtc.types import Selection, Signal, Tokens


@dataclass(frozen=True)
class LocalGlobal(Selector):
    """Of T tokens, ⌊T/2⌋ are the highest early scores of rows × columns windows, which give alike,
    one more where the best is highest; the others are the highest scores among the rest.

    Every other token is merged into the kept one of highest cosine similarity, ties to the lowest
    index: what n tokens are merged into is the mean of 1 + n.

    Args:
        early: the signal `[G, 1, N]` that windows go by.
        windows: from top to bottom, and from left to right.
        merge: whether the others are merged.
        equal: every window gives ⌊⌊T/2⌋/windows⌋, so that fewer than T may be kept.
    """

    name: ClassVar[str] = "local_global"
    needs_grid: ClassVar[bool] = True
    early: Signal = Signal("cls_row", (5,), depth=24, label="early_row", stand_in="received_row")
    windows: int = 4
    merge: bool = True
    equal: bool = False

    @property
    def count(self) -> Count:  # type: ignore[override]  # the rest only reads it
        """Less where windows give what divides evenly."""
        return "at_most" if self.equal else "exact"

    @property
    def needs(self) -> tuple[Signal, ...]:
        """What windows go by."""
        return (self.early,)

    def __call__(self, tokens: Tokens, scores: Tensor | None, counts: Tensor) -> Selection:
        """Choose; raises `VtcError` on missing or NaN scores."""
        scores = checked_scores(self.name, tokens, scores)
        window, number = squares(tokens, self.windows, self.windows), self.windows**2
        sizes = window_sizes(window, tokens.valid, number)
        half = constant(counts // 2, sizes.device)
        early = tokens.signal(self.early.key)[:, 0].float()
        if self.equal:
            quota = torch.minimum((half // number)[:, None], sizes)
        else:
            quota = quotas(half, _nearly_even(early, window, sizes), sizes)
        local = top_in_windows(early, tokens.valid, window, quota)
        rest = constant(counts - counts // 2, sizes.device)
        mask = local | ops.topk_mask(scores, tokens.valid & ~local, rest)
        width = None if self.equal else int(counts.max()) if len(counts) else 0
        grids = tokens.grid, tokens.parts
        found = Selection.of_mask(mask, tokens.lengths, tokens.parent, *grids, scores, width)
        return merged_into_nearest(tokens, found) if self.merge else found


def _nearly_even(early: Tensor, window: Tensor, sizes: Tensor) -> Tensor:
    """Weights `float64[G, W]` of windows, apart by too little to change more than who is first
    given what does not divide: the one whose best is highest."""
    best = torch.full(sizes.shape, float("-inf"), device=sizes.device)
    best = best.scatter_reduce(1, window, torch.nan_to_num(early, nan=float("-inf")), "amax")
    order = best.argsort(dim=1, descending=True, stable=True)
    rank = torch.zeros_like(order).scatter(
        1, order, torch.arange(order.shape[1], device=order.device).expand_as(order)
    )
    return 1 - 1e-6 * rank.double() / rank.shape[1]


def merged_into_nearest(tokens: Tokens, kept: Selection) -> Selection:
    """A selection of tokens into which all others are merged, each into the one of highest cosine
    similarity; ties go to the lowest. Kept tokens and what is merged into them weigh alike."""
    x = normalize(tokens.features.float().masked_fill(~tokens.valid[..., None], 0), dim=-1)
    groups = torch.arange(len(x), device=x.device)[:, None]
    like = x @ x[groups, kept.keep].transpose(1, 2)  # [G, N, K]
    slot = like.masked_fill(~kept.valid[:, None], float("-inf")).argmax(-1)
    place = torch.arange(kept.keep.shape[1], device=x.device).expand_as(kept.keep)
    # a kept token stays with itself, whatever equals it
    wide = torch.nn.functional.pad(slot, (0, 1))
    slot = wide.scatter(1, kept.keep.masked_fill(~kept.valid, x.shape[1]), place)[:, :-1]
    size = torch.zeros_like(kept.keep).scatter_add(1, slot, tokens.valid.long())
    weight = (1 / size.clamp_min(1).float()).gather(1, slot).masked_fill(~tokens.valid, 0)
    token = torch.arange(x.shape[1], device=x.device).expand_as(slot)
    return replace(kept, merge=(slot.masked_fill(~tokens.valid, 0), token, weight))
