"""EVS: what changes between the frames of a video."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from vtc.methods.base import Method
from vtc.scorers import FrameChange, Scorer
from vtc.selectors import Count, Selector, TopK
from vtc.types import Budget, Tokens


@dataclass(frozen=True, kw_only=True)
class Evs(Method):
    """EVS, efficient video sampling (Bagrov et al., arXiv 2510.14624).

    On the tokens of a video in the LLM's embedding space: 1 − cos between a token and the one of
    the same cell a frame before; the first frame is kept. The max(tokens of a frame, ⌊N·(1 − q)⌋)
    highest stay, ties to the lowest index, in original order. Images are left whole, and so is
    what a model is given as single pictures (LLaVA-1.5, LLaVA-NeXT, InternVL).

    `keep` is left out: q says how much goes, of videos alone. No default of q is published.

    Args:
        q: the share of a video's tokens that go.
    """

    name: ClassVar[str] = "evs"
    summary: ClassVar[str] = "tokens of a video that changed since the frame before; images whole"
    count: ClassVar[Count] = "adaptive"
    published_positions: ClassVar = "keep"
    bibtex: ClassVar[str] = """@article{bagrov2025evs,
  title={Efficient Video Sampling: Pruning Temporally Redundant Tokens for Faster VLM Inference},
  author={Bagrov, Natan and others},
  journal={arXiv preprint arXiv:2510.14624},
  year={2025}
}"""

    q: float = 0.5

    def __post_init__(self) -> None:
        super().__post_init__()
        self.expect(0 <= self.q <= 1, "a share in [0, 1]", "q")

    def default_scorer(self) -> Scorer:
        """The change since the frame before."""
        return FrameChange()

    def default_selector(self) -> Selector:
        """The highest."""
        return TopK()

    def counts(self, tokens: Tokens, scores: Tensor | None, budget: Budget) -> Tensor:
        """Of a video at least a frame, of an image all."""
        return torch.tensor([max(h * w, int(t * h * w * (1 - self.q))) for t, h, w in tokens.grid])
