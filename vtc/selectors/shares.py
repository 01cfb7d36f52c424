"""How much each row of an image (a crop, a tile, a frame) gives of what is kept of the image."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from vtc.errors import OptionError
from vtc.sites import BlockView
from vtc.types import Budget, largest_remainder

Sharing = Callable[[int, list[int]], list[int]]


def even_shares(wanted: int, sizes: list[int]) -> list[int]:
    """`wanted` tokens over rows in proportion to their sizes, by largest remainder.

    Raises:
        OptionError: a row would have none.
    """
    shares = largest_remainder(sizes, lambda total: min(wanted, total))
    if any(size and not share for size, share in zip(sizes, shares, strict=True)):
        raise OptionError(
            f"keep={wanted} tokens were to be shared by {len(sizes)} crops or frames of an image, "
            f"expected at least one for each: pass keep={len(sizes)} or more, or another method"
        )
    return shares


def roomy_shares(wanted: int, sizes: list[int]) -> list[int]:
    """More than `wanted` tokens, because a later cut chooses among them (FlowCut).

    One row: 2T; several: ⌊T/2⌋ each, beyond five rows at most ⌈2.5T/rows⌉; more where T would not
    be left otherwise.
    """
    rows, total = len(sizes), min(wanted, sum(sizes))
    share = 2 * wanted if rows == 1 else wanted // 2
    if rows > 5:
        share = min(share, -(-5 * wanted // (2 * rows)))
    while sum(min(share, size) for size in sizes) < total:
        share += 1
    return [min(share, size) for size in sizes]


def row_targets(
    view: BlockView, budget: Budget, sharing: Callable[[int], Sharing] = lambda image: even_shares
) -> Tensor:
    """Units of each row that leave the encoder, `int64[R]` on the CPU: rows of an image share what
    is kept of it.

    Args:
        view: of any block.
        budget: how much is kept of each image.
        sharing: for the number of an image, how: `even_shares`, `roomy_shares`.

    Raises:
        OptionError: a row would have none.
    """
    found = torch.zeros_like(view.units)
    for i, n in enumerate(view.tokens):
        mine = view.image == i
        shares = sharing(i)(budget.count(n), view.units[mine].tolist())
        found[mine] = torch.tensor(shares, dtype=found.dtype)
    return found
