"""What a decoder layer's attention would compute with, without running the layer."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from vtc.errors import SignalError, UnsupportedModeError
from vtc.runtime.probe import Stock, intercepted


def projected(
    layer: Any, hidden: Tensor, angles: tuple[Tensor, Tensor], cached: Any, before: int
) -> tuple[Tensor, Tensor, Tensor, float]:
    """Queries, keys and values of a decoder layer at some entries, and the scale of q·k.

    The layer's own norm and attention module are called, and nothing is attended to; its cache is
    left alone.

    Args:
        layer: with an `input_layernorm` and a `self_attn`.
        hidden: `[B, S, D]`, its input.
        angles: cosines and sines of the rotary positions.
        cached: its layer of the cache; None where that is empty.
        before: how many entries that holds.

    Returns:
        `[B, H, S, d]`, twice `[B, Hkv, before + S, d]`, and the scale.

    Raises:
        SignalError: the attention does not look its implementation up in its config.
        UnsupportedModeError: the cache does not show its keys.
    """
    found: list[tuple[Tensor, Tensor, Tensor, float]] = []

    def note(
        stock: Stock, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scale: float
    ) -> Tensor:
        found.append((query, key, value, scale))
        return query.new_zeros(len(query), query.shape[2], query.shape[1], value.shape[-1])

    attention = layer.self_attn
    with torch.no_grad(), intercepted(attention, note):
        # past the hooks of seams that wait for the layer's own run
        attention.forward(
            hidden_states=layer.input_layernorm(hidden),
            position_embeddings=angles,
            attention_mask=None,
        )
    if not found:
        raise SignalError(
            "the attention of a decoder layer was not seen, expected it to look its implementation "
            "up in its config: use a stock transformers model"
        )
    query, key, value, scale = found[0]
    if cached is not None:
        keys, values = (getattr(cached, name, None) for name in ("keys", "values"))
        if not (isinstance(keys, Tensor) and isinstance(values, Tensor)):
            raise UnsupportedModeError(
                f"a {type(cached).__name__} does not show its keys, expected a dynamic or static "
                "cache with a method that looks at the next decoder layer"
            )
        key, value = (
            torch.cat([x[:, :, :before].to(new), new], 2)
            for x, new in ((keys, key), (values, value))
        )
    return query, key, value, scale
