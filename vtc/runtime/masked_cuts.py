"""Cuts inside the encoder without a host: what a method drops is hidden from attention, not taken
out, so that no shape depends on numbers and one graph holds the encoder with all its decisions.

A patch that is never attended to is as good as gone: what it becomes is dropped before the LLM.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.utils.rnn import pad_sequence

from vtc.dispatch import constant
from vtc.errors import VtcError
from vtc.runtime.cuts import EncoderCuts
from vtc.runtime.layouts import RowLayout
from vtc.runtime.masked_layouts import MaskedPacked, MaskedRows
from vtc.runtime.packed_layout import PackedLayout
from vtc.runtime.rows import Run
from vtc.sites import BlockView, Cut
from vtc.types import Budget


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
        patches: `bool[R, P]`, over the patches of each row: in raster order, in a packed tower in
            that of the pixel input, padded.
        lengths: `int64[L]`, patches through each block.
    """

    survivors: Tensor
    patches: Tensor
    lengths: Tensor


class MaskedCuts(EncoderCuts):
    """`EncoderCuts` that hide patches, of a `Masking` method in one run.

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
        kind = MaskedPacked if self.encoder.packed else MaskedRows
        return kind(self.encoder, run, hidden)

    def _decided(self, layout: RowLayout | PackedLayout, block: int, hidden: Tensor) -> Tensor:
        method: Any = self.method
        if not isinstance(layout, MaskedRows | MaskedPacked) or not isinstance(method, Masking):
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
        if not isinstance(layout, MaskedRows | MaskedPacked):
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
