"""How much a token is like the text behind the row's images."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor
from torch.nn.functional import normalize

from vtc.errors import SignalError
from vtc.scorers.base import Scorer
from vtc.types import TEXT, Signal, Tokens


@dataclass(frozen=True)
class TextRelevance(Scorer):
    """mean_m cos(x_i, t_m) over the text behind the last image of the row, its special tokens
    included; both as the LLM embeds them."""

    name: ClassVar[str] = "text_relevance"

    @property
    def needs(self) -> tuple[Signal, ...]:
        """The embeddings of that text."""
        return (Signal(TEXT),)

    def __call__(self, tokens: Tokens) -> Tensor:
        """Scores `float32[G, N]`."""
        text, there = text_of(tokens)
        x = normalize(tokens.features.float().masked_fill(~tokens.valid[..., None], 0), dim=-1)
        mean = normalize(text, dim=-1).sum(1) / there.sum(-1, keepdim=True).clamp_min(1)  # [G, D]
        return (x * mean[:, None]).sum(-1)


def text_of(tokens: Tokens) -> tuple[Tensor, Tensor]:
    """The text that each group is compared with, `float32[G, M, D]`, 0 on padding, and which of it
    is there, `bool[G, M]`; raises `SignalError` where none was given."""
    if tokens.text is None or tokens.text_valid is None:
        raise SignalError(
            "the text behind the images was not captured; name Signal('text') in the scorer's "
            "`needs`"
        )
    rows, device = tokens.parent[:, 1].to(tokens.text.device), tokens.features.device
    there = tokens.text_valid[rows].to(device)
    return tokens.text[rows].to(device).float().masked_fill(~there[..., None], 0), there
