"""Equally spaced tokens."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from vtc.dispatch import constant
from vtc.selectors.base import Selector, selection_of
from vtc.types import Selection, Tokens


@dataclass(frozen=True)
class UniformStride(Selector):
    """Token floor((2i + 1)·n / 2k) for i = 0..k−1: the middle of k equal stretches of n tokens."""

    name: ClassVar[str] = "uniform"
    uses_scores: ClassVar[bool] = False

    def __call__(self, tokens: Tokens, scores: Tensor | None, counts: Tensor) -> Selection:
        """Choose; scores are ignored."""
        device = tokens.valid.device
        lengths = torch.tensor(tokens.lengths, dtype=torch.int64)
        i = torch.arange(int(counts.max()) if len(counts) else 0)
        valid = constant(i < counts[:, None], device)
        rank = (2 * i + 1) * lengths[:, None] // (2 * counts[:, None].clamp_min(1))
        rank = constant(rank, device)
        # a rank counts valid tokens; padding may stand anywhere
        order = (~tokens.valid).int().argsort(dim=-1, stable=True)
        keep = order.gather(1, rank.masked_fill(~valid, 0)).masked_fill(~valid, 0)
        return selection_of(tokens, keep, valid)
