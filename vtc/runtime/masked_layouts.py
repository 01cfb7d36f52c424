"""The encoder's sequence where every patch keeps its place and some are hidden from attention."""

from __future__ import annotations

from functools import cached_property
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from vtc.adapters.base import Encoder
from vtc.dispatch import constant
from vtc.runtime.layouts import Layout, RowLayout
from vtc.runtime.packed_layout import PackedLayout
from vtc.runtime.rows import Run

_ALIGNED = 16  # attention kernels copy masks whose rows do not begin at multiples of this


class _Masked(Layout):
    """What both have in common: `valid` says which units are not hidden."""

    _hides, _stale = False, False
    _bias: Tensor | None = None

    def _put(self, known: Tensor) -> Tensor:
        return constant(known, self.device)

    @property
    def patches(self) -> int:
        """Not known before the call is over, see `Left`."""
        return 0

    def spread(self, values: Tensor) -> Tensor:
        """Numbers `[R, U]`, 0 where hidden."""
        return values.masked_fill(~self.valid, 0)

    def alive(self, block: int) -> Tensor:
        """`bool[R, U]`: those that were not hidden within `block`."""
        return self._in_force[block][1]

    def hide(self, keep: Tensor) -> None:
        """Hide what is not at `bool[R, U]`, among those of `reaching`."""
        self.valid, self._hides, self._stale = keep, True, True

    def _by_patch(self, units: Tensor) -> Tensor:
        return units if self.m == 1 else units.repeat_interleave(self.m, 1)

    def raster_of(self, alive: Tensor) -> Tensor:
        """Units `bool[R, U]` as patches `bool[R, P]`, see `Left`."""
        return self._by_patch(alive)

    def _hiding(self, query: Tensor, rows: int, entries: int, first: int) -> Tensor | None:
        """`[rows, 1, 1, entries]`, low numbers at what is hidden, `first` entries being none of the
        units; None before the first decision."""
        if not self._hides:
            return None
        if self._bias is None:
            wide = -(-entries // _ALIGNED) * _ALIGNED
            self._bias = query.new_zeros(rows, 1, 1, wide)
        bias = self._bias[..., :entries]
        if self._stale:
            # what is hidden once stays so: in place, behind the blocks that read it before
            hidden = self._by_patch(self._placed(~self.valid))[:, None, None]
            # half of the lowest: in a window that is all hidden, sums must stay numbers
            bias[..., first:].masked_fill_(hidden, torch.finfo(bias.dtype).min / 2)
            self._stale = False
        return bias

    def _placed(self, units: Tensor) -> Tensor:
        """Flags `[R, U]` as they stand in the sequence."""
        return units


class MaskedRows(_Masked, RowLayout):
    """Rows of their own."""

    @cached_property
    def _reach(self) -> Tensor | None:
        """The units that LLM tokens are made of; None: all."""
        reach = torch.zeros(len(self.units) * self.full, dtype=torch.bool)
        reach[torch.cat(self.known_units)] = True
        return None if bool(reach.all()) else self._put(reach.view(-1, self.full))

    @property
    def reaching(self) -> Tensor:
        """`bool[R, U]`: what is left that LLM tokens are made of."""
        return self.valid if self._reach is None else self.valid & self._reach

    def assembled(self, chunks: list[Tensor]) -> Tensor:
        """Queries, keys or values of one block; what is hidden holds what it became."""
        return chunks[0]

    def hide(self, keep: Tensor) -> None:
        """See above."""
        if self._reach is not None:
            # padding of a canvas stays until the first unit of any row goes
            keep = torch.where((keep != self.reaching).any(), keep, self.valid)
        super().hide(keep)

    def mask(self, query: Tensor) -> Tensor | None:
        """Additive, from the first decision on."""
        return self._hiding(query, len(query), self.first + self.total, self.first)

    @cached_property
    def _back(self) -> Tensor | None:
        """Which place each patch of a row in raster order has; None: the same."""
        if self._together:
            return None
        together = self.run.units(self.total)
        return None if together is None else self._put(together.flatten().argsort())

    def raster_of(self, alive: Tensor) -> Tensor:
        """See above."""
        found = super().raster_of(alive)
        return found if self._back is None else found[:, self._back]

    def _filled(self, hidden: Tensor, block: int) -> Tensor:
        if self._back is None:
            return hidden
        return torch.cat([hidden[:, : self.first], hidden[:, self.first :][:, self._back]], 1)


class MaskedPacked(_Masked, PackedLayout):
    """One sequence, in which attention sees all segments at once (`probe.together`)."""

    moving: tuple[str, ...] = ("index", "valid", "where", "_unit")

    def __init__(self, encoder: Encoder, run: Run, hidden: Tensor) -> None:
        Layout.__init__(self, encoder, run, run.lengths, hidden.device)
        self.total = int(run.lengths.sum())
        order = torch.arange(self.total) if run.order is None else run.order
        places = order.argsort().split(run.lengths.tolist())
        self.where = self._put(pad_sequence(list(places), batch_first=True))
        there = torch.arange(self.full) < run.lengths[:, None]
        # which of the units `[R · U]` stands at each place
        self._unit = self._put(there.flatten().nonzero()[:, 0][order])

    @property
    def reaching(self) -> Tensor:
        """`bool[R, U]`: what is left; every unit becomes an LLM token."""
        return self.valid

    def assembled(self, chunks: list[Tensor]) -> Tensor:
        """Queries, keys or values `[1, H, T, d]` as rows `[R, H, U·m, d]`; what is hidden and
        padding hold anything."""
        (x,) = chunks
        units = x[0].transpose(0, 1).unflatten(0, (-1, self.m))  # [n, m, H, d]
        rows: Tensor = units[self.where].flatten(1, 2)
        return rows.transpose(1, 2)

    def _placed(self, units: Tensor) -> Tensor:
        return units.flatten()[self._unit][None]

    def mask(self, query: Tensor) -> Tensor | None:
        """Additive over the whole sequence, from the first decision on."""
        return self._hiding(query, 1, self.total * self.m, 0)

    def arguments(self, kwargs: dict[str, Any]) -> dict[str, Any]:
        """As they are."""
        return kwargs

    def restored(self, hidden: Tensor) -> Tensor:
        """As it is."""
        return hidden
