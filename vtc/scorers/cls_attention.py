"""Attention that [CLS] pays to each patch, over a window of encoder blocks (THU-MIG/VTC-CLS)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from torch import Tensor

from vtc.scorers.base import Scorer
from vtc.types import Signal, Tokens

# the last attention that shapes what the LLM reads (block 22 of 24 in LLaVA-1.5); without [CLS],
# what a patch receives from all others
AT_TAP = Signal("cls_row", ends_at_tap=True, stand_in="received_row")


@dataclass(frozen=True)
class ClsAttention(Scorer):
    """Sum, minimum or maximum over blocks of the head-averaged [CLS] row, [CLS] itself left out.

    The row is not renormalized: the softmax runs over [CLS] and all patches, so a block whose [CLS]
    looks at itself weighs less.

    Args:
        window: the blocks read.
        ensemble: how blocks are combined.
    """

    name: ClassVar[str] = "cls_attention"
    window: Signal = Signal("cls_row", range(16, 23), depth=24, ends_at_tap=True)
    ensemble: Literal["sum", "min", "max"] = "sum"

    @property
    def needs(self) -> tuple[Signal, ...]:
        """The [CLS] row of each block of the window."""
        return (self.window,)

    def __call__(self, tokens: Tokens) -> Tensor:
        """Scores `float32[G, N]`."""
        rows = tokens.signal(self.window.key).float()  # [G, L, N]
        if self.ensemble == "sum":
            return rows.sum(1)
        return rows.amin(1) if self.ensemble == "min" else rows.amax(1)
