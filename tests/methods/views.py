"""What methods see inside the encoder and the LLM, built by hand or at random."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from vtc.sites import BlockView, LayerView


def random_view(
    units: Sequence[int],
    *,
    m: int = 1,
    cls: bool = True,
    block: int = 0,
    tap: int = 5,
    rows: Sequence[int] | None = None,
    seeds: Sequence[int] | None = None,
    extra: int = 0,
    filler: float = 0.0,
    heads: int = 2,
    dim: int = 8,
    sharp: float = 2.0,
) -> BlockView:
    """Rows of `units` each, padded by `extra`; a row is a function of its seed alone."""
    rows = rows or [1] * len(units)
    width, c = max(units) + extra, int(cls)
    parts = torch.full((3, len(units), heads, c + width * m, dim), filler)
    for r, n in enumerate(units):
        draw = torch.Generator().manual_seed(seeds[r] if seeds else r)
        parts[:, r, :, : c + n * m] = torch.randn(3, heads, c + n * m, dim, generator=draw) * sharp
    valid = torch.arange(width) < torch.tensor(units)[:, None]
    image = torch.repeat_interleave(torch.arange(len(rows)), torch.tensor(rows))
    return BlockView(
        block=block,
        tap=tap,
        valid=valid,
        index=torch.arange(width).expand(len(units), -1) * valid,
        units=torch.tensor(units),
        image=image,
        tokens=tuple(int(torch.tensor(units)[image == i].sum()) for i in range(len(rows))),
        rows=tuple(rows),
        has_cls=cls,
        query=parts[0],
        key=parts[1],
        value=parts[2],
        scale=dim**-0.5,
        carry={},
    )


def layer_view(
    rows: Sequence[Sequence[int | None]],
    *,
    n: int = 6,
    past: int = 0,
    pad: str = "left",
    heads: int = 2,
    dim: int = 8,
    seed: int = 0,
    layer: int = 1,
    **parts: Any,
) -> LayerView:
    """A row is text lengths with None for an image of `n` tokens; a row is a function of its
    content alone. `parts` replaces query, key, value or scale."""
    kinds = [
        [part is None for part in row for _ in range(n if part is None else part)] for row in rows
    ]
    width = max(map(len, kinds))
    shape = len(rows), heads, past + width, dim
    made = {name: torch.zeros(shape) for name in ("query", "key", "value")}
    mask = torch.zeros(len(rows), width, dtype=torch.bool)
    visual = mask.clone()
    columns, parent = [], []
    for b, kind in enumerate(kinds):
        start = width - len(kind) if pad == "left" else 0
        span = slice(start, start + len(kind))
        mask[b, span], visual[b, span] = True, torch.tensor(kind)
        draw = torch.Generator().manual_seed(seed + len(kind) + 97 * sum(kind))
        for tensor in made.values():
            tensor[b, :, :past] = torch.randn(heads, past, dim, generator=draw)
            tensor[b, :, past + start : past + start + len(kind)] = torch.randn(
                heads, len(kind), dim, generator=draw
            )
        for i in range(sum(kind) // n):
            columns.append(visual[b].nonzero()[i * n : (i + 1) * n, 0])
            parent.append([len(parent), b])
    return LayerView(
        layer=layer,
        valid=torch.ones(len(columns), n, dtype=torch.bool),
        index=torch.arange(n).expand(len(columns), -1),
        columns=torch.stack(columns),
        parent=torch.tensor(parent),
        tokens=(n,) * len(columns),
        mask=mask,
        visual=visual,
        query=parts.get("query", made["query"][:, :, past:]),
        key=parts.get("key", made["key"]),
        value=parts.get("value", made["value"]),
        scale=parts.get("scale", dim**-0.5),
    )
