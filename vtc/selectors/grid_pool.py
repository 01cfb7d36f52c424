"""A coarser grid in place of the original one: which cells a new token covers, and where it
sits."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from vtc.selectors.base import Count, Selector
from vtc.types import Selection, Tokens


def largest_grid(h: int, w: int, budget: int) -> tuple[int, int]:
    """The largest grid (⌊s·h⌋, ⌊s·w⌋), s ≤ 1, at least 1×1, of at most `budget` cells: aspect
    kept."""
    # the grid only changes where s·h or s·w is whole
    scales = sorted(
        {i / h for i in range(1, h + 1)} | {i / w for i in range(1, w + 1)}, reverse=True
    )
    for s in scales:
        size = max(1, math.floor(s * h + 1e-9)), max(1, math.floor(s * w + 1e-9))
        if size[0] * size[1] <= budget:
            return size
    return 1, 1


def _averages(n: int, m: int) -> Tensor:
    """Adaptive average pooling of n cells to m, as a matrix `[m, n]` whose rows sum to 1."""
    i, cell = torch.arange(m)[:, None], torch.arange(n)
    bins = (cell >= i * n // m) & (cell < -(-(i + 1) * n // m))
    return bins / bins.sum(-1, keepdim=True)


@lru_cache(maxsize=64)
def pooled_cells(h: int, w: int, size: tuple[int, int]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Adaptive average pooling of an h×w grid to `size`, as sparse triples.

    Returns:
        `slot [P]`, `token [P]`, `weight [P]` (each slot's weights sum to 1) and `center [S]`, the
        original cell that holds the middle of each slot.
    """
    weights = torch.kron(_averages(h, size[0]), _averages(w, size[1]))  # [S, h·w]
    slot, token = weights.nonzero(as_tuple=True)
    y = (2 * torch.arange(size[0]) + 1) * h // (2 * size[0])
    x = (2 * torch.arange(size[1]) + 1) * w // (2 * size[1])
    return slot, token, weights[slot, token], (y[:, None] * w + x).flatten()


@dataclass(frozen=True)
class GridPool(Selector):
    """Replaces all tokens of a group by the cells of the largest coarser grid within the count."""

    name: ClassVar[str] = "grid_pool"
    uses_scores: ClassVar[bool] = False
    count: ClassVar[Count] = "at_most"

    def __call__(self, tokens: Tokens, scores: Tensor | None, counts: Tensor) -> Selection:
        """Pool; the realized number of slots is at most the count. Frames share the count
        equally."""
        device = tokens.valid.device
        slots, members, weights, centers = [], [], [], []
        for (t, h, w), count in zip(tokens.grid, counts.tolist(), strict=True):
            size = largest_grid(h, w, max(1, count // t))
            slot, token, weight, center = pooled_cells(h, w, size)
            frame = torch.arange(t)[:, None]
            slots.append((slot + frame * size[0] * size[1]).flatten())
            members.append((token + frame * h * w).flatten())
            weights.append(weight.repeat(t))
            centers.append((center + frame * h * w).flatten())
        none = torch.zeros(len(counts), 0, dtype=torch.int64, device=device)
        return Selection(
            keep=none,
            valid=none.bool(),
            lengths=tokens.lengths,
            parent=tokens.parent.cpu(),
            grid=tokens.grid,
            positions=_pad(centers, -1).to(device),
            merge=(
                _pad(slots, 0).to(device),
                _pad(members, 0).to(device),
                _pad(weights, 0).to(device),
            ),
        )


def _pad(parts: list[Tensor], value: int) -> Tensor:
    return pad_sequence(parts, batch_first=True, padding_value=value)
