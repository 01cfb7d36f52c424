"""Cuts inside the encoder without a host: what a method drops is hidden from attention, not taken
out, so that no shape depends on numbers and one graph holds the encoder with all its decisions.

A patch that is never attended to is as good as gone: what it becomes is dropped before the LLM.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.utils.rnn import pad_sequence

from vtc.dispatch import constant
from vtc.errors import VtcError
from vtc.runtime.cuts import EncoderCuts
from vtc.runtime.layouts import RowLayout
from vtc.runtime.packed_layout import PackedLayout
from vtc.runtime.rows import Run
from vtc.sites import BlockView, Cut
from vtc.types import Budget

_ALIGNED = 16  # attention kernels copy masks whose rows do not begin at multiples of this


@runtime_checkable
class Masking(Protocol):
    """A method whose cuts inside the encoder the device can decide alone."""

    def mask_refusal(self) -> str | None:
        """Why it cannot with these options; None if it can."""

    def encoder_mask(self, view: BlockView, budget: Budget) -> Cut:
        """As `Method.encoder_cut`, without reading what it computes. Padding of the view may hold
        anything."""

    def targets(self, view: BlockView, budget: Budget) -> Tensor:
        """Units of each row that are left in the end, `int64[R]` on the CPU, from sizes alone."""


@dataclass(frozen=True, eq=False)
class Left:
    """What cuts left of the images of a call, on their device.

    Attributes:
        survivors: `bool[G, N]`, over LLM tokens.
        patches: `bool[R, P]`, over the patches of each row in raster order.
        lengths: `int64[L]`, patches through each block.
    """

    survivors: Tensor
    patches: Tensor
    lengths: Tensor


class MaskedLayout(RowLayout):
    """Rows of which every unit keeps its place; `valid` says which are hidden."""

    def __init__(self, *given: Any) -> None:
        self._hides, self._stale = False, False
        self._bias: Tensor | None = None
        super().__init__(*given)

    def _put(self, known: Tensor) -> Tensor:
        return constant(known, self.device)

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

    @property
    def patches(self) -> int:
        """Not known before the call is over, see `Left`."""
        return 0

    def assembled(self, chunks: list[Tensor]) -> Tensor:
        """Queries, keys or values of one block; what is hidden holds what it became."""
        return chunks[0]

    def spread(self, values: Tensor) -> Tensor:
        """Numbers `[R, U]`, 0 where hidden."""
        return values.masked_fill(~self.valid, 0)

    def alive(self, block: int) -> Tensor:
        """`bool[R, U]`: those that were not hidden within `block`."""
        return self._in_force[block][1]

    def hide(self, keep: Tensor) -> None:
        """Hide what is not at `bool[R, U]`, among those of `reaching`."""
        if self._reach is not None:
            # padding of a canvas stays until the first unit of any row goes
            keep = torch.where((keep != self.reaching).any(), keep, self.valid)
        self.valid, self._hides, self._stale = keep, True, True

    def mask(self, query: Tensor) -> Tensor | None:
        """Additive, from the first decision on."""
        if not self._hides:
            return None
        if self._bias is None:
            wide = -(-(self.first + self.total) // _ALIGNED) * _ALIGNED
            self._bias = query.new_zeros(len(query), 1, 1, wide)
        bias = self._bias[..., : self.first + self.total]
        if self._stale:
            # what is hidden once stays so: in place, behind the blocks that read it before
            hidden = self._by_patch(~self.valid)[:, None, None]
            bias[..., self.first :].masked_fill_(hidden, torch.finfo(bias.dtype).min)
            self._stale = False
        return bias

    def _by_patch(self, units: Tensor) -> Tensor:
        return units if self.m == 1 else units.repeat_interleave(self.m, 1)

    @cached_property
    def _back(self) -> Tensor | None:
        """Which place each patch of a row in raster order has; None: the same."""
        if self._together:
            return None
        together = self.run.units(self.total)
        return None if together is None else self._put(together.flatten().argsort())

    def raster_of(self, alive: Tensor) -> Tensor:
        """Units `bool[R, U]` as patches `bool[R, P]` in raster order."""
        found = self._by_patch(alive)
        return found if self._back is None else found[:, self._back]

    def _filled(self, hidden: Tensor, block: int) -> Tensor:
        if self._back is None:
            return hidden
        return torch.cat([hidden[:, : self.first], hidden[:, self.first :][:, self._back]], 1)


class MaskedCuts(EncoderCuts):
    """`EncoderCuts` that hide patches, of a `Masking` method over rows of one run.

    Attributes:
        left: of the last call.
        counts: tokens of each image that were left, or None.
    """

    left: Left | None = None
    counts: tuple[int, ...] = ()

    def clear(self) -> None:
        """Forget what an earlier call left."""
        super().clear()
        self.left, self.counts = None, ()

    def _laid_out(self, run: Run, hidden: Tensor) -> RowLayout | PackedLayout:
        return MaskedLayout(self.encoder, run, hidden)

    def _decided(self, layout: RowLayout | PackedLayout, block: int, hidden: Tensor) -> Tensor:
        method: Any = self.method
        if not isinstance(layout, MaskedLayout) or not isinstance(method, Masking):
            raise VtcError(
                f"method {self.method.name!r} cannot hide patches, expected one that can"
            )
        view = self._view(layout, block, hidden)
        with torch.no_grad():
            cut = method.encoder_mask(view, self._budget)
        self._carry = dict(cut.carry)
        if cut.keep is not None:
            layout.hide(cut.keep)
        if block == max(self.blocks):
            targets = method.targets(view, self._budget)
            sums = torch.zeros(len(view.rows), dtype=torch.long).index_add(0, view.image, targets)
            self.counts = tuple(sums.tolist())
        return hidden

    def _noted(self, layout: RowLayout | PackedLayout) -> None:
        if not isinstance(layout, MaskedLayout):
            return
        alive, units = layout.alive(self.encoder.tap), layout.known_units
        there = [torch.ones_like(where, dtype=torch.bool) for where in units]
        place, valid = (
            constant(pad_sequence(parts, batch_first=True), layout.device)
            for parts in (units, there)
        )
        blocks = range(layout.last + 1)
        lengths = torch.stack([layout.alive(b) for b in blocks]).sum((1, 2)) * layout.m
        self.left = Left(
            survivors=alive.flatten()[place] & valid,
            patches=layout.raster_of(alive),
            lengths=F.pad(lengths, (0, self.encoder.depth - len(blocks))),
        )
