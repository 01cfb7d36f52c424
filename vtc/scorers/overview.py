"""Another scorer's scores, where the whole picture is shown."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor

from vtc.dispatch import constant
from vtc.scorers.base import Scorer
from vtc.scorers.cls_attention import ClsAttention
from vtc.types import Signal, Tokens


@dataclass(frozen=True)
class Overview(Scorer):
    """−∞ outside of `Tokens.overview` (the thumbnail of an image of several crops).

    Args:
        of: whose scores.
    """

    name: ClassVar[str] = "overview"
    of: Scorer = field(default_factory=ClsAttention)

    @property
    def needs(self) -> tuple[Signal, ...]:
        """What the other scorer reads."""
        return self.of.needs

    def __call__(self, tokens: Tokens) -> Tensor:
        """Scores `float32[G, N]`."""
        scores = self.of(tokens)
        if tokens.overview is None:
            return scores
        first, end = torch.tensor(tokens.overview).T[..., None]  # [G, 1] each
        place = torch.arange(scores.shape[1])
        outside = constant((place < first) | (place >= end), scores.device)
        return scores.masked_fill(outside, float("-inf"))
