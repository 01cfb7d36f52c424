"""Position ids between decoder layers, counted anew where visual tokens have left."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from vtc.errors import SignalError
from vtc.runtime.compaction import repacked
from vtc.runtime.layer_cache import LayerState
from vtc.runtime.layer_stage import Stage, repeated

Angles = tuple[Tensor, Tensor]


class Recounted:
    """The position ids of one run of a language model, as each group of its layers counts them.

    Args:
        rotary: makes cosines and sines of ids.
        state: what the cache remembers.
        anew: whether what this run drops moves positions, or only what earlier ones did.
    """

    def __init__(self, rotary: Any, state: LayerState | None, anew: bool = True) -> None:
        self._rotary, self._anew = rotary, anew
        self._behind = () if state is None else state.shifts
        self._given: Tensor | None = None
        self._counted: dict[tuple[Stage, bool], Tensor] = {}

    def see(self, ids: Tensor) -> None:
        """Note the ids `[(P,) 1 or B, Q]` that all layers would go by."""
        self._given = ids

    def angles(self, group: int, stage: Stage | None, whole: bool, hidden: Tensor) -> Angles | None:
        """Cosines and sines in the layers of a group, for the type and on the device of `hidden
        [B, L, D]`; None: those that are given to all layers.

        Args:
            group: of the layers.
            stage: what is left of a prompt; None: it is a later step.
            whole: whether that is all of it.
            hidden: its rows are those of the run.
        """
        shift = self._behind[group] if self._behind else None
        whole = whole or not self._anew
        if whole and shift is None:
            return None
        batch = len(hidden)
        ids = self._all(batch) if stage is None else self._ids(stage, whole, batch)
        if shift is not None:
            ids = ids - shift.to(ids.device)[:, None]
        turned = self._rotary.forward(hidden, ids.clamp_min(0))
        return turned[0].to(hidden.device), turned[1].to(hidden.device)

    def shifts(self, stages: Sequence[Stage], batch: int) -> tuple[Tensor | None, ...]:
        """By how much less each row counts what comes behind a prompt, in each group: `int64[B]`;
        None: as much."""
        first, found = stages[0], list[Tensor | None]()
        for group, stage in enumerate(stages):
            shift = self._behind[group] if self._behind else None
            if self._anew and stage.columns is not first.columns:
                less = self._end(first, True, batch) - self._end(stage, False, batch)
                shift = less if shift is None else less + shift.to(less.device)
            found.append(shift)
        return tuple(found) if any(shift is not None for shift in found) else ()

    def _all(self, batch: int) -> Tensor:
        """`[(P,) B, Q]`."""
        if self._given is None:
            raise SignalError(
                "position ids were to be counted anew between decoder layers and were not seen, "
                "expected a language model that turns them into angles by its rotary_emb: use "
                "positions='keep'"
            )
        return self._given.expand(*self._given.shape[:-2], batch, -1)

    def _ids(self, stage: Stage, whole: bool, batch: int) -> Tensor:
        """Those of the entries of a stage, `[(P,) B, L]`; 0 where nothing is attended to."""
        if (stage, whole) not in self._counted:
            self._counted[stage, whole] = self._count(stage, whole, batch)
        return self._counted[stage, whole]

    def _count(self, stage: Stage, whole: bool, batch: int) -> Tensor:
        given = self._all(batch)
        columns, mask = self._rows(stage, batch, given.device)
        own = given.gather(-1, columns.expand(*given.shape[:-1], -1))
        if whole:
            return own
        start = own.gather(-1, mask.int().argmax(-1, keepdim=True).expand(*own.shape[:-1], 1))
        if own.dim() == 2:
            counted = start + mask.cumsum(-1) - 1
        else:
            image = repeated(_images(stage), batch // len(stage.mask))
            counted = repacked(own, image, mask, start[..., 0].amax(0))
        return counted.masked_fill(~mask, 0)

    def _end(self, stage: Stage, whole: bool, batch: int) -> Tensor:
        """The highest id of each row, `int64[B]`."""
        ids = self._ids(stage, whole, batch)
        _, mask = self._rows(stage, batch, ids.device)
        highest = ids.masked_fill(~mask, -1).amax(-1)
        return highest if highest.dim() == 1 else highest.amax(0)

    def _rows(self, stage: Stage, batch: int, device: torch.device) -> tuple[Tensor, Tensor]:
        """Columns and masks of a stage for the rows of the run."""
        copies = batch // len(stage.mask)
        columns, mask = (repeated(x, copies).to(device) for x in (stage.columns, stage.mask))
        return columns, mask


def _images(stage: Stage) -> Tensor:
    """The image that each entry of a stage belongs to, −1 for text and padding, `int64[B, L]`."""
    found = torch.full_like(stage.columns, -1)
    rows = stage.placed.parent[:, 1:].expand_as(stage.places)
    number = torch.arange(len(rows), device=found.device)[:, None].expand_as(rows)
    there = stage.valid
    return found.index_put((rows[there], stage.places[there]), number[there])
