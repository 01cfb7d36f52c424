"""Crops share what is kept by how much an early block looks at each in the thumbnail (HiRED)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from vtc import ops
from vtc.dispatch import constant
from vtc.errors import OptionError
from vtc.selectors.base import Selector, checked_scores
from vtc.selectors.windows import chosen, quotas, top_in_windows, window_sizes
from vtc.types import ENCODER_ROW, Selection, Signal, Tokens


@dataclass(frozen=True)
class CropQuotas(Selector):
    """The highest scores of the thumbnail and of each crop.

    The thumbnail gives min(⌊alpha·T⌋, its n tokens). Crops share the rest of T in proportion to
    marks: the ⌊(1 − alpha)·n⌋ thumbnail tokens of highest early scores, counted in the crop that
    shows the same part of the picture.

    An image of one part is a choice of the highest scores. Where the parts of an image do not say
    how its crops lie, each gets the marks of an equal run of the thumbnail.

    Args:
        early: the signal `[G, 1, N]` that marks go by.
        alpha: as above.
        runs: whether runs are taken in any case.
    """

    name: ClassVar[str] = "crop_quotas"
    early: Signal = Signal("cls_row", (0,), label="early_row", stand_in="received_row")
    alpha: float = 0.5
    runs: bool = False

    def __post_init__(self) -> None:
        if not 0 <= self.alpha <= 1:
            raise OptionError(f"crop_quotas got alpha={self.alpha}, expected a share in [0, 1]")

    @property
    def needs(self) -> tuple[Signal, ...]:
        """What marks go by, and the crop of each token."""
        return (self.early, Signal(ENCODER_ROW))

    def __call__(self, tokens: Tokens, scores: Tensor | None, counts: Tensor) -> Selection:
        """Choose; raises `VtcError` on missing or NaN scores."""
        scores, device = checked_scores(self.name, tokens, scores), tokens.valid.device
        laid = [self._layout(tokens, g, n) for g, n in enumerate(tokens.lengths)]
        windows = 1 + max((int(crop.max()) for crop, _ in laid if len(crop)), default=0)
        window, shows, first, marked = (torch.zeros(tokens.valid.shape).long() for _ in range(4))
        for g, (crop, of) in enumerate(laid):
            window[g, : len(crop)], shows[g, : len(of)] = crop, of
            first[g, : len(crop)] = crop == 0
        thumb = first.sum(1)
        room = thumb.new_tensor(tokens.lengths) - thumb
        # crops that are too small leave more to the thumbnail
        own = torch.maximum((self.alpha * counts).long().minimum(thumb), counts - room)
        own = torch.where(room == 0, counts, own)
        marks = ((1 - self.alpha) * thumb).long()
        seen = tokens.valid & constant(first.bool(), device)
        marked = ops.topk_mask(tokens.signal(self.early.key)[:, 0], seen, constant(marks, device))
        weights = torch.zeros(len(window), windows, device=device)
        weights = weights.scatter_add(1, constant(shows, device), marked.float())
        window, own = constant(window, device), constant(own, device)
        sizes = window_sizes(window, tokens.valid, windows)
        sizes[:, 0] = 0
        weights[:, 0] = 0
        quota = quotas(constant(counts, device) - own, weights, sizes)
        quota[:, 0] = own
        mask = top_in_windows(scores, tokens.valid, window, quota)
        return chosen(tokens, mask, counts, scores)

    def _layout(self, tokens: Tokens, g: int, n: int) -> tuple[Tensor, Tensor]:
        """Of a group of n tokens: the crop of each, the thumbnail first, and the crop that shows
        what each of the thumbnail's shows. A group of one part is a thumbnail."""
        nothing = torch.zeros(n).long()
        first, end = (0, n) if tokens.overview is None else tokens.overview[g]
        rows = tokens.signal(ENCODER_ROW)[g, :n].cpu()
        if end - first == n:
            return nothing, nothing
        outside = torch.cat([rows[:first], rows[end:]])
        known, crops = outside.unique(return_inverse=True)
        window = torch.cat([crops[:first] + 1, nothing[first:end], crops[first:] + 1])
        cells = torch.arange(end - first)
        shown = cells * len(known) // (end - first) + 1
        parts = () if tokens.parts is None else tokens.parts[g]
        if len(parts) == 2 and first == 0 and not self.runs:
            (_, h, w), (_, canvas_h, canvas_w) = parts
            y = (2 * (cells // w) + 1) * canvas_h // (2 * h)
            x = (2 * (cells % w) + 1) * canvas_w // (2 * w)
            shown = window[end + y * canvas_w + x]
        shows = nothing.clone()
        shows[first:end] = shown
        return window, shows
