"""How close a token is to the mean of its group."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor
from torch.nn.functional import normalize

from vtc.scorers.base import Scorer
from vtc.types import Tokens


@dataclass(frozen=True)
class Center(Scorer):
    """x·μ of L2-normalized features x and their mean μ: for unit vectors the order of −‖x − μ‖².

    Args:
        nearest: whether the token nearest to the mean scores highest, or the farthest.
    """

    name: ClassVar[str] = "center"
    nearest: bool = True

    def __call__(self, tokens: Tokens) -> Tensor:
        """Scores `float32[G, N]`."""
        x = normalize(tokens.features.float().masked_fill(~tokens.valid[..., None], 0), dim=-1)
        mean = x.sum(1) / tokens.valid.sum(-1, keepdim=True).clamp_min(1)  # [G, D]
        closeness = (x * mean[:, None]).sum(-1)
        return closeness if self.nearest else -closeness
