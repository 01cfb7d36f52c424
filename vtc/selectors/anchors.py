"""Anchors of an inner block with their neighbors, and the highest scores besides (HiPrune)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from vtc import ops
from vtc.dispatch import constant
from vtc.errors import OptionError
from vtc.selectors.base import Selector, checked_scores
from vtc.selectors.windows import chosen
from vtc.types import Selection, Signal, Tokens

# an anchor and the cells left, right, above and below
_CROSS = 5


@dataclass(frozen=True)
class Anchors(Selector):
    """Anchors are the a = round(T·alpha/5) tokens of the highest inner scores; they and their four
    neighbors in the grid are kept, then the highest scores of the others, up to T.

    Args:
        inner: the signal `[G, 1, N]` that anchors go by.
        alpha: as above.
        wraps: whether the neighbor beyond the end of a row is the beginning of the next, and beyond
            the first or last token that token itself.
    """

    name: ClassVar[str] = "anchors"
    needs_grid: ClassVar[bool] = True
    inner: Signal = Signal("received_row", (8,), depth=24, label="inner_row")
    alpha: float = 0.1
    wraps: bool = False

    def __post_init__(self) -> None:
        if not 0 <= self.alpha <= 1:
            raise OptionError(f"anchors got alpha={self.alpha}, expected a share in [0, 1]")

    @property
    def needs(self) -> tuple[Signal, ...]:
        """What anchors go by."""
        return (self.inner,)

    def __call__(self, tokens: Tokens, scores: Tensor | None, counts: Tensor) -> Selection:
        """Choose; raises `VtcError` on missing or NaN scores."""
        scores, valid = checked_scores(self.name, tokens, scores), tokens.valid
        inner, device = tokens.signal(self.inner.key)[:, 0], valid.device
        # halves go to even, as published; no more than fit with all of their neighbors
        anchors = [min(round(t * self.alpha / _CROSS), t // _CROSS) for t in counts.tolist()]
        first = ops.topk_mask(inner, valid, constant(tuple(anchors), device))
        around = constant(self._neighbors(tokens), device)  # [G, N, 5]
        near = first[..., None].expand(around.shape) & (around >= 0)
        taken = (
            torch.zeros_like(valid)
            .int()
            .scatter_reduce(1, around.clamp_min(0).flatten(1), near.int().flatten(1), "amax")
        )
        taken = taken.bool() & valid
        more = constant(counts, device) - taken.sum(1)
        return chosen(tokens, taken | ops.topk_mask(scores, valid & ~taken, more), counts, scores)

    def _neighbors(self, tokens: Tokens) -> Tensor:
        """Each token of each group with its neighbors, `int64[G, N, 5]`, −1 where there is none."""
        found = torch.full((*tokens.valid.shape, _CROSS), -1)
        for g, (t, h, w) in enumerate(tokens.grid):
            i = torch.arange(n := t * h * w)
            if self.wraps:
                steps = torch.tensor([0, -1, 1, -w, w])
                found[g, :n] = (i[:, None] + steps).clamp(0, n - 1)
                continue
            y, x = i // w % h, i % w
            inside = [x >= 0, x > 0, x < w - 1, y > 0, y < h - 1]
            near = torch.stack([i, i - 1, i + 1, i - w, i + w], -1)
            found[g, :n] = near.masked_fill(~torch.stack(inside, -1), -1)
        return found
