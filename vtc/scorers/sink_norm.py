"""Attention sinks by their massive activations: those are to go."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from vtc.scorers.base import Scorer
from vtc.types import Tokens


@dataclass(frozen=True)
class SinkNorm(Scorer):
    """Minus the massive activation of each token (`vtc.ops.massive_activation`): the strongest
    sinks go first."""

    name: ClassVar[str] = "sink_norm"

    def __call__(self, tokens: Tokens) -> Tensor:
        """Scores `float32[G, N]`."""
        return -tokens.signal("sink_norm")
