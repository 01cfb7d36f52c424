"""Which cells of a grid of pixels cannot be told from those before them (PixelPrune)."""

from __future__ import annotations

import torch
from torch import Tensor


def unpredicted(pixels: Tensor, tau: float) -> Tensor:
    """The cells that differ from their prediction, `bool[F, h, w]`.

    With A the cell to the left, B the one above and C the one above A: the prediction is B where C
    equals A and not B, else A; the first row knows A alone, the first column B alone, and the first
    cell is always kept. Equal means at most `tau` apart in every value. A cell that is not kept is
    its prediction for those behind it, so that small differences do not add up.

    Args:
        pixels: `[F, h, w, v]`, frames that do not see each other.
        tau: 0 for equality.
    """
    frames, h, w, _ = pixels.shape
    known, kept = pixels.clone(), torch.zeros(frames, h, w, dtype=torch.bool, device=pixels.device)
    kept[:, 0, 0] = True
    # cells of one diagonal know all that they are predicted from
    for diagonal in range(1, h + w - 1):
        y = torch.arange(max(0, diagonal - w + 1), min(h, diagonal + 1), device=pixels.device)
        x = diagonal - y
        left = known[:, y, (x - 1).clamp_min(0)]
        above = known[:, (y - 1).clamp_min(0), x]
        corner = known[:, (y - 1).clamp_min(0), (x - 1).clamp_min(0)]
        turns = _equal(corner, left, tau) & ~_equal(corner, above, tau)
        from_above = (turns & (y > 0)) | (x == 0)
        guess = torch.where(from_above[..., None], above, left)
        same = _equal(guess, known[:, y, x], tau)
        kept[:, y, x] = ~same
        known[:, y, x] = torch.where(same[..., None], guess, known[:, y, x])
    return kept


def unpredicted_units(pixels: Tensor, cells: Tensor, valid: Tensor, tau: float) -> Tensor:
    """The same of rows of an encoder, `bool[R, U]`; each has one unit at least that is kept.

    Args:
        pixels: `[R, U, v]`.
        cells: `int64[R, U, 3]` on the CPU, frame, row and column of each unit; −1 on padding.
        valid: `bool[R, U]`, what can be kept: padding of a canvas predicts, and is not kept.
        tau: 0 for equality.
    """
    keep = valid.clone()
    for r, row in enumerate(cells):
        (at,) = (row[:, 0] >= 0).nonzero(as_tuple=True)
        frames, h, w = (int(n) + 1 for n in row[at].amax(0))
        place = (row[at] @ torch.tensor([h * w, w, 1])).to(keep.device)
        own = at.to(keep.device)
        grid = pixels.new_zeros(frames * h * w, pixels.shape[-1])
        grid = grid.index_put((place,), pixels[r, own]).view(frames, h, w, -1)
        keep[r, own] &= unpredicted(grid, tau).flatten()[place]
    # of a row whose first cell is padding of a canvas, something has to stay
    nothing = ~keep.any(1) & valid.any(1)
    first = torch.zeros_like(keep).scatter(1, valid.int().argmax(1, keepdim=True), True)
    return keep | (first & nothing[:, None])


def _equal(a: Tensor, b: Tensor, tau: float) -> Tensor:
    return (a - b).abs().amax(-1) <= tau
