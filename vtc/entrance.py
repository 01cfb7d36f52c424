"""What a view of a decoder layer gives when it is asked: the LLM's input, and what the next layer
would compute with. Letters as in `vtc.sites`."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True, eq=False)
class Entrance:
    """What the first decoder layer got, before any cut between layers.

    Letters: E entries of the prompt then.

    Attributes:
        embeds: `[B, E, D]`, the input embeddings.
        mask: `bool[B, E]`, False on padding.
        visual: `bool[B, E]`, True on visual tokens.
        entry: `int64[B, S]`, which of the E each entry of the view is.
        angles: cosines and sines of the rotary positions of the S entries, `[B, S, d]` each; on
            some versions `[3, B, S, d]` with M-RoPE.
    """

    embeds: Tensor
    mask: Tensor
    visual: Tensor
    entry: Tensor
    angles: tuple[Tensor, Tensor]


@dataclass(frozen=True, eq=False)
class Heads:
    """What one decoder layer's attention computes with.

    Attributes:
        query: as in `LayerView`, like the others.
        key: likewise.
        value: likewise.
        scale: likewise.
        held: likewise.
    """

    query: Tensor
    key: Tensor
    value: Tensor
    scale: float
    held: Tensor | None = None
