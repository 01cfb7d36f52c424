"""What is added to attention on entries that stand for several tokens, and masks that carry it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from vtc.errors import UnsupportedModeError


def check_biased(implementation: str) -> None:
    """Refuse attention to which nothing can be added.

    Raises:
        UnsupportedModeError: it takes no such mask.
    """
    if implementation not in ("eager", "sdpa"):
        raise UnsupportedModeError(
            f"attention {implementation!r} takes no numbers that are added to it, expected 'sdpa' "
            "or 'eager' with a method that weighs merged tokens by their size: load the model with "
            "attn_implementation='sdpa'"
        )


def biased(mask: Any, bias: Tensor, before: int, keys: int, hidden: Tensor) -> Tensor:
    """A layer's mask with something added to the attention logits on each entry.

    Args:
        mask: as transformers made it: bool or additive `[B or 1, 1, queries, keys]`, or None where
            it is causal alone.
        bias: `float[B, L]`, of the first L keys; others get nothing.
        before: keys before those of the queries.
        keys: all of them.
        hidden: the layer's input `[B, queries, D]`.
    """
    if mask is None:
        at = before + torch.arange(hidden.shape[1], device=hidden.device)
        mask = (torch.arange(keys, device=hidden.device) <= at[:, None])[None, None]
    more = max(mask.shape[-1] - bias.shape[1], 0)
    columns = F.pad(bias.to(hidden), (0, more))[:, None, None, : mask.shape[-1]]
    lowest = torch.finfo(hidden.dtype).min
    seen = mask if mask.dtype == torch.bool else mask > lowest
    added = columns if mask.dtype == torch.bool else mask + columns
    return torch.where(seen, added, lowest)


def joined(parts: list[tuple[Tensor | None, int]], like: Tensor) -> Tensor | None:
    """Biases side by side, `float[B, sum]`, on the device of `like` and for its rows; None stands
    for as many zeros. None if all are."""
    if all(bias is None for bias, _ in parts):
        return None
    return torch.cat(
        [
            torch.zeros(len(like), width, device=like.device)
            if bias is None
            else bias.to(like.device)
            for bias, width in parts
        ],
        1,
    )
