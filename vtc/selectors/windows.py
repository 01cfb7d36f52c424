"""How much each window of a group (a run, a square, a crop) gives of what is kept, and its best."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from vtc.dispatch import constant
from vtc.selectors.base import Selector, checked_scores
from vtc.types import Selection, Tokens


def quotas(
    totals: Tensor,
    weights: Tensor,
    capacity: Tensor,
    rest: Literal["remainder", "weight"] = "remainder",
) -> Tensor:
    """`totals[g]` tokens over the windows of each group in proportion to weights, none above its
    capacity: what does not fit is dealt to the others in the same way. Ties go to the lower window;
    where all weights left are 0, capacities take their place. Nothing waits for the device.

    Args:
        totals: `int64[G]`, at most the sum of the capacities.
        weights: `[G, W]`, at least 0.
        capacity: `int64[G, W]`.
        rest: what is left of rounding down goes to the largest remainders, or the largest weights.

    Returns:
        `int64[G, W]` that sums to `totals`.
    """
    weights, left = weights.double(), totals.to(weights.device)[:, None]
    full, share = capacity <= 0, torch.zeros_like(weights)
    for _ in range(weights.shape[1]):
        given = torch.where(full, capacity, 0).sum(1, keepdim=True)
        open_weights = weights.masked_fill(full, 0)
        none = open_weights.sum(1, keepdim=True) <= 0
        open_weights = torch.where(none, capacity.double().masked_fill(full, 0), open_weights)
        total = open_weights.sum(1, keepdim=True).clamp_min(torch.finfo(torch.double).tiny)
        share = (left - given) * (open_weights / total)
        full = full | (share >= capacity)
    share = torch.where(full, capacity.double(), share)
    whole = torch.minimum((share + 1e-9).floor().long(), capacity)
    missing = left - whole.sum(1, keepdim=True)
    rank_by = share - whole if rest == "remainder" else weights
    order = rank_by.masked_fill(whole >= capacity, float("-inf")).argsort(
        dim=1, descending=True, stable=True
    )
    more = torch.arange(order.shape[1], device=order.device) < missing
    return whole + torch.zeros_like(whole).scatter(1, order, more.long())


def top_in_windows(scores: Tensor, valid: Tensor, window: Tensor, quota: Tensor) -> Tensor:
    """The `quota[g, w]` highest scores of each window, `bool[G, N]`; ties go to the lowest index.

    Args:
        scores: `[G, N]`.
        valid: `bool[G, N]`.
        window: `int64[G, N]`, which window each token is in.
        quota: `int64[G, W]`.
    """
    of = window.masked_fill(~valid, quota.shape[1])
    by_score = scores.float().masked_fill(~valid, 0).argsort(dim=1, descending=True, stable=True)
    order = by_score.gather(1, of.gather(1, by_score).argsort(dim=1, stable=True))
    sizes = torch.zeros(len(of), quota.shape[1] + 1, dtype=torch.int64, device=of.device)
    sizes = sizes.scatter_add(1, of, torch.ones_like(of))
    of = of.gather(1, order)
    rank = torch.arange(of.shape[1], device=of.device) - (sizes.cumsum(1) - sizes).gather(1, of)
    most = torch.nn.functional.pad(quota, (0, 1)).gather(1, of)
    return torch.zeros_like(valid).scatter(1, order, rank < most) & valid


def window_sizes(window: Tensor, valid: Tensor, windows: int) -> Tensor:
    """Tokens in each window, `int64[G, W]`."""
    sizes = torch.zeros(len(window), windows + 1, dtype=torch.int64, device=window.device)
    return sizes.scatter_add(1, window.masked_fill(~valid, windows), valid.long())[:, :-1]


def squares(tokens: Tokens, rows: int, columns: int) -> Tensor:
    """Each frame of a group's grid cut into rows × columns windows of nearly the same size,
    `int64[G, N]`; frames share them."""
    window = torch.zeros(tokens.valid.shape, dtype=torch.int64)
    for g, (t, h, w) in enumerate(tokens.grid):
        y, x = torch.arange(h) * rows // h, torch.arange(w) * columns // w
        window[g, : t * h * w] = (y[:, None] * columns + x).flatten().repeat(t)
    return constant(window, tokens.valid.device)


def runs(tokens: Tokens, count: int) -> Tensor:
    """The tokens of a group cut into so many runs, the first ones longer by one where that does not
    divide, `int64[G, N]`."""
    window = torch.zeros(tokens.valid.shape, dtype=torch.int64)
    for g, n in enumerate(tokens.lengths):
        for number, run in enumerate(torch.arange(n).tensor_split(count)):
            window[g, run] = number
    return constant(window, tokens.valid.device)


@dataclass(frozen=True)
class EvenWindows(Selector):
    """The highest scores of each of rows × columns windows of the grid, all of which give alike.

    Args:
        rows: windows from top to bottom.
        columns: windows from left to right.
    """

    name: ClassVar[str] = "even_windows"
    needs_grid: ClassVar[bool] = True
    rows: int = 4
    columns: int = 4

    def __call__(self, tokens: Tokens, scores: Tensor | None, counts: Tensor) -> Selection:
        """Choose; raises `VtcError` on missing or NaN scores."""
        scores = checked_scores(self.name, tokens, scores)
        window, number = squares(tokens, self.rows, self.columns), self.rows * self.columns
        sizes = window_sizes(window, tokens.valid, number)
        quota = quotas(constant(counts, sizes.device), torch.ones_like(sizes), sizes)
        mask = top_in_windows(scores, tokens.valid, window, quota)
        return chosen(tokens, mask, counts, scores)


def chosen(tokens: Tokens, mask: Tensor, counts: Tensor, scores: Tensor | None) -> Selection:
    """The selection of the tokens at `mask [G, N]`, `counts[g]` of each group."""
    return Selection.of_mask(
        mask,
        tokens.lengths,
        tokens.parent,
        tokens.grid,
        tokens.parts,
        scores=scores,
        width=int(counts.max()) if len(counts) else 0,
    )
