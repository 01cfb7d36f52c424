"""Tokens that cover the text and the picture at once (MMTok)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn.functional import normalize

from vtc.errors import OptionError
from vtc.scorers.text_relevance import text_of
from vtc.selectors.base import Selector, selection_of
from vtc.selectors.coverage import cosines, greedy_coverage
from vtc.types import TEXT, Selection, Signal, Tokens

_FEATURES = Signal("encoder_features", ends_at_tap=True)


@dataclass(frozen=True)
class TextCoverage(Selector):
    """Greedy maximum coverage Σ_rows max_{c chosen} of two maps over the tokens of a group.

    From each of m text tokens z, softmax(z·x̂ᵀ/τ_tv)/m, x̂ the normalized tokens in the LLM's
    embedding space; from each of n tokens, alpha·softmax(v̂·v̂ᵀ/τ_vv)/n, v̂ normalized features of
    the encoder.

    Args:
        alpha: weight of the picture.
        text_temperature: τ_tv.
        vision_temperature: τ_vv.
    """

    name: ClassVar[str] = "text_coverage"
    uses_scores: ClassVar[bool] = False
    alpha: float = 0.5
    text_temperature: float = 0.02
    vision_temperature: float = 0.2

    def __post_init__(self) -> None:
        if self.alpha < 0 or min(self.text_temperature, self.vision_temperature) <= 0:
            raise OptionError(
                f"text_coverage got alpha={self.alpha} and temperatures {self.text_temperature} "
                f"and {self.vision_temperature}, expected at least 0, and above 0"
            )

    @property
    def needs(self) -> tuple[Signal, ...]:
        """The text behind the images and the encoder's features."""
        return (Signal(TEXT), _FEATURES)

    def __call__(self, tokens: Tokens, scores: Tensor | None, counts: Tensor) -> Selection:
        """Choose; scores are ignored."""
        valid, (text, there) = tokens.valid, text_of(tokens)
        x = normalize(tokens.features.float().masked_fill(~valid[..., None], 0), dim=-1)
        seen = _shares(text @ x.mT / self.text_temperature, valid, there)
        near = cosines(tokens.signal(_FEATURES.key), valid) / self.vision_temperature
        rows = torch.cat([seen, self.alpha * _shares(near, valid, valid)], 1)
        return selection_of(tokens, *greedy_coverage(rows, valid, counts))


def _shares(logits: Tensor, valid: Tensor, rows: Tensor) -> Tensor:
    """Softmax of `[G, R, N]` over valid tokens, divided by the rows there are; 0 in the others."""
    shares = logits.masked_fill(~valid[:, None], float("-inf")).softmax(-1)
    shares = shares / rows.sum(-1).clamp_min(1)[:, None, None]
    return shares.masked_fill(~rows[..., None], 0)
