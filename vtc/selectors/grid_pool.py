"""A coarser grid in place of the original one: which cells a new token covers, and where it
sits."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from vtc.errors import InputError
from vtc.selectors.base import Count, Selector
from vtc.types import Selection, Tokens, largest_remainder


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
def pooled_cells(
    grid: tuple[int, int, int], size: tuple[int, int, int]
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Adaptive average pooling of a t×h×w grid to `size`, as sparse triples.

    Returns:
        `slot [P]`, `token [P]`, `weight [P]` (each slot's weights sum to 1) and `center [S]`, the
        original cell that holds the middle of each slot.
    """
    weights = torch.ones(1, 1)
    center = torch.zeros(1, dtype=torch.int64)
    for n, m in zip(grid, size, strict=True):
        weights = torch.kron(weights, _averages(n, m))  # [S, t·h·w]
        middle = (2 * torch.arange(m) + 1) * n // (2 * m)
        center = (center[:, None] * n + middle).flatten()
    slot, token = weights.nonzero(as_tuple=True)
    return slot, token, weights[slot, token], center


@dataclass(frozen=True)
class GridPool(Selector):
    """Replaces all tokens of a group by the cells of the largest coarser grid within the count.

    The frames of a video share the count equally; where there are more frames than that, they are
    averaged too. The parts of an image of several crops share it by largest remainder.

    Args:
        overview: the part that shows the whole picture stands for an image of several parts, and
            every frame stays.
    """

    name: ClassVar[str] = "grid_pool"
    uses_scores: ClassVar[bool] = False
    count: ClassVar[Count] = "at_most"
    needs_grid: ClassVar[bool] = True
    overview: bool = False

    def __call__(self, tokens: Tokens, scores: Tensor | None, counts: Tensor) -> Selection:
        """Pool; the realized number of slots is at most the count."""
        device = tokens.valid.device
        found = [self._pooled(tokens, g, count) for g, count in enumerate(counts.tolist())]
        slots, members, weights, centers = zip(*found, strict=True)
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
            parts=tokens.parts,
        )

    def _pooled(self, tokens: Tokens, group: int, count: int) -> tuple[Tensor, ...]:
        """Slots, members, weights and centers of one group."""
        parts = (tokens.grid[group],) if tokens.parts is None else tokens.parts[group]
        sizes = [t * h * w for t, h, w in parts]
        first = [sum(sizes[:i]) for i in range(len(sizes))]
        shares = largest_remainder(sizes, lambda n: min(count, n))
        if self.overview and len(parts) > 1 and tokens.overview is not None:
            start = tokens.overview[group][0]
            shares = [
                min(count, n) if at == start else 0 for at, n in zip(first, sizes, strict=True)
            ]
        found: list[tuple[Tensor, ...]] = []
        slots = 0
        for (t, h, w), at, share in zip(parts, first, shares, strict=True):
            if not share:
                continue
            if self.overview and t > share:
                raise InputError(
                    f"grid_pool got a video of {t} frames and {share} tokens to keep of it, "
                    f"expected at least one for each frame: pass keep>={t}"
                )
            frames = t if self.overview else min(t, share)
            size = (frames, *largest_grid(h, w, max(1, share // frames)))
            slot, token, weight, center = pooled_cells((t, h, w), size)
            found.append((slot + slots, token + at, weight, center + at))
            slots += len(center)
        return tuple(torch.cat(kind) for kind in zip(*found, strict=True))


def _pad(parts: Sequence[Tensor], value: int) -> Tensor:
    return pad_sequence(list(parts), batch_first=True, padding_value=value)
