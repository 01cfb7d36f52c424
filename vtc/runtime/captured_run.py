"""A prefill with cuts between decoder layers that asks the device nothing, so that it can be
captured."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from vtc.checks import require_none
from vtc.dispatch import constant
from vtc.runtime.graphs import CaptureError
from vtc.runtime.layer_run import LayerRun
from vtc.runtime.layer_stage import Stage
from vtc.sites import LayerCut, LayerView

# attention kernels copy masks whose rows do not begin at multiples of 16
_ALIGNED = 32


class CapturedRun(LayerRun):
    """As `LayerRun`, of a whole prompt in front of an empty cache.

    Attributes:
        counts: how many tokens of each image of a view a cut leaves, `int64[G]` on the CPU; None:
            what it sees decides. Then what it drops is hidden, and only one cut can be.
    """

    counts: Callable[[LayerView], Tensor | None]
    _lengths: tuple[int, ...] | None = None
    _longest = 0

    def _cut(self, layer: int, hidden: Tensor, given: dict[str, Any]) -> Stage:
        before, placed = self.stages[-1], self.stages[0].placed
        if self._lengths is None:
            self._lengths = placed.lengths
            self._longest = before.entries if placed.longest is None else placed.longest
        view = replace(self._view(layer, hidden, given), lengths=self._lengths, rows=placed.rows)
        counts, cut = self.counts(view), self._decided(view)
        if isinstance(cut, LayerCut):
            raise CaptureError("where merged tokens stand is found on the host")
        if counts is None:
            if len(self._cuts) > 1:
                raise CaptureError("what one cut leaves of the sequence decides about the next")
            return before.hidden(cut)
        lengths = tuple(counts.tolist())
        if lengths == view.lengths:
            return before
        gone = torch.zeros(len(before.mask), dtype=torch.long)
        gone.index_add_(0, torch.tensor(placed.rows), view.left - counts)
        self._longest -= int(gone.min())
        entries = min(before.entries, -(-self._longest // _ALIGNED) * _ALIGNED)
        known, left = (constant(of, cut.device) for of in (view.left, counts))
        require_none(
            (view.valid.sum(-1) != known) | ((view.valid & cut).sum(-1) != left),
            "a cut between decoder layers saw or left other numbers of tokens than their sizes "
            "say, expected these: patch with fast=False",
        )
        self._lengths = lengths
        return before.cut_to(cut, entries, lengths)

    def _decided(self, view: LayerView) -> Tensor | LayerCut:
        if self._decide is None:
            raise CaptureError("nobody decides")
        return self._decide(view)

    def _causal(self, layer: int, group: int, stage: Stage | None, hidden: Tensor) -> Tensor:
        stage = self.stages[group] if stage is None else stage
        return visible(hidden, stage.mask)


def visible(hidden: Tensor, mask: Tensor, place: Tensor | None = None) -> Tensor:
    """What each entry `[B, L, D]` attends to, as numbers to be added, `[B, 1, L, n]`: once, instead
    of in each layer.

    Args:
        hidden: tells length and type.
        mask: `[B, n]` over the entries that there are.
        place: `int64[L]`, which of them each of the L is; None: they are the L.
    """
    entry = torch.arange(mask.shape[-1], device=hidden.device)
    seen = entry <= (entry if place is None else place)[:, None]
    seen = seen & (mask[:, None] != 0)  # [B, L, n]
    lowest = torch.finfo(hidden.dtype).min
    return torch.zeros_like(seen, dtype=hidden.dtype).masked_fill(~seen, lowest)[:, None]
