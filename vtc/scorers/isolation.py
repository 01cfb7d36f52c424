"""How far a token is from the one most like it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn.functional import normalize

from vtc.scorers.base import Scorer
from vtc.types import Tokens

# numbers in the largest map of similarities formed at once: 64 MiB of float32
_MAP = 2**24


@dataclass(frozen=True)
class Isolation(Scorer):
    """1 − max_{j ≠ i} cos(x_i, x_j) in the LLM's embedding space; 2 for a token alone."""

    name: ClassVar[str] = "isolation"

    def __call__(self, tokens: Tokens) -> Tensor:
        """Scores `float32[G, N]`; N×N is formed in parts."""
        valid, n = tokens.valid, tokens.valid.shape[1]
        x = normalize(tokens.features.float().masked_fill(~valid[..., None], 0), dim=-1)
        others = torch.arange(n, device=x.device)
        nearest = []
        for part in others.split(max(1, _MAP // max(len(x) * n, 1))):
            likeness = x[:, part] @ x.mT  # [G, R, N]
            beside = valid[:, None] & (others != part[:, None])
            nearest.append(likeness.masked_fill(~beside, -1).amax(-1))
        return 1 - torch.cat(nearest, 1) if nearest else x.new_zeros(valid.shape)
