"""Decoder layers of a stock model that count positions anew, as if some columns were not there."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from .fed import numbered


@contextmanager
def recounted_from_layer(
    model: Any, layer: int, positions: Tensor, image: Tensor, kept: Tensor
) -> Iterator[None]:
    """Within it, in decoder layers from `layer` on, the entries in `kept [B, S]` of a prompt have
    positions without gaps, and what comes behind it counts on from there.

    Args:
        model: the whole one.
        layer: the first.
        positions: `[B, S]`, with M-RoPE `[4, B, S]`, those in the layers before.
        image: `[B, S]`, which image a column belongs to, −1 for text.
        kept: padding is not among them.
    """
    axes = positions[1:] if positions.dim() == 3 else positions
    new, less = torch.zeros_like(axes), torch.zeros(len(kept), dtype=torch.long)
    for b, row in enumerate(kept):
        columns = row.nonzero().flatten().tolist()
        ids = numbered(positions[..., b, :], image[b].tolist(), columns)
        new[..., b, columns] = ids if ids.dim() == 1 else ids[1:]
        less[b] = axes[..., b, columns].max() - new[..., b, columns].max()
    language, given = model.model.language_model, list[Tensor]()

    def see(module: Any, args: Any, kwargs: dict[str, Any]) -> None:
        given[:] = [kwargs["position_ids"] if "position_ids" in kwargs else args[1]]

    def turn(module: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        hidden = args[0] if args else kwargs["hidden_states"]
        copies, prompt = len(hidden) // len(kept), kept.shape[1]
        ids = given[0] - less.repeat_interleave(copies)[:, None]
        if hidden.shape[1] >= prompt:
            ids = torch.cat([new.repeat_interleave(copies, -2), ids[..., prompt:]], -1)
        return args, {**kwargs, "position_embeddings": language.rotary_emb.forward(hidden, ids)}

    hooks = [language.rotary_emb.register_forward_pre_hook(see, with_kwargs=True)]
    hooks += [
        one.register_forward_pre_hook(turn, with_kwargs=True) for one in language.layers[layer:]
    ]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
