"""Attention within the segments of one long sequence, all at once instead of one by one."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from vtc.dispatch import constant

# padding up to this many times the sequence costs less than walking over segments
_ROOM = 1.5


def by_segment(
    implementation: Callable[..., Any],
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    bias: Tensor | None,
    cu_seq_lens_q: Tensor,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Attention `[1, T, H, d]` of `[1, H, T, d]` within segments.

    Segments of one length are a batch; others are padded to the longest and masked, unless that
    would be much longer than the sequence itself.

    Args:
        implementation: of transformers, for rows `[n, H, w, d]`.
        module: that attends.
        query, key, value: `[1, H, T, d]`.
        bias: `[1, 1, 1, T]`, added to attention on each entry; or None.
        cu_seq_lens_q: `int[n + 1]` on the CPU, the borders.
        **kwargs: of the implementation; what belongs to borders is left out.
    """
    given = {k: v for k, v in kwargs.items() if not k.startswith(("cu_seq_lens", "max_length"))}
    parts = (query[0], key[0], value[0])
    lengths = cu_seq_lens_q.diff().tolist()
    count, longest, total = len(lengths), max(lengths), parts[0].shape[1]
    if count == 1:
        return implementation(module, query, key, value, bias, **given)[0], None
    if len(set(lengths)) == 1:
        rows = (x.unflatten(1, (count, longest)).transpose(0, 1) for x in parts)
        own = None if bias is None else bias.view(count, 1, 1, longest)
        out = implementation(module, *rows, own, **given)[0]  # [n, w, H, d]
        return out.flatten(0, 1)[None], None
    if count * longest > _ROOM * total:
        pieces = zip(*(x[None].split(lengths, 2) for x in parts), strict=True)
        biases = [None] * count if bias is None else bias.split(lengths, 3)
        found = [
            implementation(module, *piece, own, **given)[0]
            for piece, own in zip(pieces, biases, strict=True)
        ]
        return torch.cat(found, 1), None
    index, back, padding = _padded(lengths, parts[0])
    rows = (x[:, index].transpose(0, 1) for x in parts)  # [n, H, w, d]
    if bias is not None:
        padding = torch.minimum(padding, bias.flatten()[index][:, None, None])
    out = implementation(module, *rows, padding, **given)[0]  # [n, w, H, d]
    return out.flatten(0, 1)[back][None], None


def _padded(lengths: list[int], like: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Where each entry of padded segments `[n, w]` is read, where each entry of the sequence `[T]`
    is found in them, and what hides padding, `[n, 1, 1, w]`."""
    sizes = torch.tensor(lengths)
    place = torch.arange(max(lengths))
    there = place < sizes[:, None]
    starts = sizes.cumsum(0) - sizes
    index = (starts[:, None] + place).masked_fill(~there, 0)
    back = there.flatten().nonzero()[:, 0]
    mask = constant(there, like.device)[:, None, None]
    lowest = torch.finfo(like.dtype).min
    bias = torch.zeros_like(mask, dtype=like.dtype).masked_fill(~mask, lowest)
    return constant(index, like.device), constant(back, like.device), bias
