"""How much a decoder layer does for visual rows."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from vtc.scorers.base import Scorer
from vtc.types import Tokens


@dataclass(frozen=True)
class LayerContribution(Scorer):
    """ShortV's LC score of each decoder layer: how far the next token's distribution moves when
    visual rows are frozen there, as measured by `vtc calibrate` or published. Tokens are layers."""

    name: ClassVar[str] = "layer_contribution"

    def __call__(self, tokens: Tokens) -> Tensor:
        """Scores `float32[1, L]`."""
        return tokens.signal("layer_contribution")
