"""How much a cell of a video differs from the same cell a frame before."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from vtc.scorers.base import Scorer
from vtc.types import Tokens


@dataclass(frozen=True)
class FrameChange(Scorer):
    """1 − cos(x_t, x_{t−1}) of tokens in the LLM's embedding space at the same place of successive
    frames; ∞ in the first frame, and so in all of an image."""

    name: ClassVar[str] = "frame_change"
    needs_grid: ClassVar[bool] = True

    def __call__(self, tokens: Tokens) -> Tensor:
        """Scores `float32[G, N]`."""
        scores = torch.full(tokens.valid.shape, float("inf"), device=tokens.valid.device)
        for g, (t, h, w) in enumerate(tokens.grid):
            x = tokens.features[g, : t * h * w].float().unflatten(0, (t, h * w))
            change = 1 - torch.cosine_similarity(x[1:], x[:-1], dim=-1)
            scores[g, h * w : t * h * w] = change.flatten()
        return scores
