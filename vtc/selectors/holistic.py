"""Windows give by how telling they are, each its highest scores (HoloV)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from vtc.dispatch import constant
from vtc.selectors.base import Count, Selector, checked_scores
from vtc.selectors.coverage import cosines
from vtc.selectors.windows import chosen, quotas, runs, squares, top_in_windows, window_sizes
from vtc.types import Selection, Tokens

# both of the official code: what attention is multiplied by, and the weight of variance
_ATTENTION, _VARIANCE = 1e3, 0.09
_SIDE = 4


@dataclass(frozen=True)
class Holistic(Selector):
    """16 windows share T in proportion to the mean of their tokens' telling,

    1e3·a_i + 0.09·var_i·(mean|1e3·a|/mean|var|),

    where a is the score and var_i the variance of the cosines of token i to the n − 1 others of its
    window, about their mean and with the zero of the diagonal among them; the means are those of
    the window. ⌊T·share⌋ each, the rest to the largest shares. Within a window a alone decides.

    Args:
        flat: windows are runs of the raster sequence instead of 4×4 squares of the grid, and what
            does not fit into a window is lost.
    """

    name: ClassVar[str] = "holistic"
    flat: bool = False

    @property
    def count(self) -> Count:  # type: ignore[override]  # the rest only reads it
        """Fewer where a quota is more than its run holds and that is lost."""
        return "at_most" if self.flat else "exact"

    @property
    def needs_grid(self) -> bool:  # type: ignore[override]
        """For squares."""
        return not self.flat

    def __call__(self, tokens: Tokens, scores: Tensor | None, counts: Tensor) -> Selection:
        """Choose; raises `VtcError` on missing or NaN scores."""
        scores, valid = checked_scores(self.name, tokens, scores), tokens.valid
        number = _SIDE * _SIDE
        window = runs(tokens, number) if self.flat else squares(tokens, _SIDE, _SIDE)
        sizes = window_sizes(window, valid, number)
        telling = _telling(tokens, scores.masked_fill(~valid, 0), window, sizes)
        room = constant(counts, valid.device)[:, None].expand_as(sizes) if self.flat else sizes
        room = room.masked_fill(sizes == 0, 0)
        quota = quotas(constant(counts, valid.device), telling, room, rest="weight")
        return chosen(tokens, top_in_windows(scores, valid, window, quota), counts, scores)


def _telling(tokens: Tokens, scores: Tensor, window: Tensor, sizes: Tensor) -> Tensor:
    """The mean over each window, `float32[G, W]`."""
    valid, n = tokens.valid, tokens.valid.shape[1]
    together = (window[:, None] == window[..., None]) & valid[:, None] & valid[..., None]
    beside = together & ~torch.eye(n, dtype=torch.bool, device=valid.device)
    likeness = cosines(tokens.features, valid).where(beside, 0)
    others = (beside.sum(-1)).clamp_min(1)
    mean = likeness.sum(-1) / others
    variance = ((likeness - mean[..., None]).square().where(together, 0)).sum(-1) / others

    def by_window(x: Tensor) -> Tensor:
        sums = torch.zeros(sizes.shape, device=x.device)
        return sums.scatter_add(1, window, x.masked_fill(~valid, 0)) / sizes.clamp_min(1)

    attention = _ATTENTION * scores
    size = by_window(variance)
    # where nothing varies, variance adds nothing
    scale = torch.where(size > 0, by_window(attention.abs()) / size, 0)
    return by_window(attention + _VARIANCE * variance * scale.gather(1, window))
