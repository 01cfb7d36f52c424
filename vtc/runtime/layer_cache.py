"""What a cache whose layers hold unequal lengths must remember, and each layer's mask from it.

A group is a run of decoder layers that see the same entries: those up to and with the first layer
that cuts, those up to the next, and so on.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from vtc.errors import InputError, UnsupportedModeError

_STATE = "_vtc_layers"


@dataclass(frozen=True, eq=False)
class LayerState:
    """What a cache remembers: the entries up to the last one dropped between layers.

    What stands behind is the same in all layers, so that its mask is the one given to the model.

    Attributes:
        masks: per group `bool[B, L]` over these entries in its layers; None: all ones.
        lengths: L of each group.
        batch: B.
        biases: per group `float[B, L]`, what is added to the attention logits on these entries;
            None: nothing. Empty: nothing anywhere.
        shifts: per group `int64[B]`, by how much less its layers count the positions of what stands
            behind; None: as much. Empty: as much everywhere.
    """

    masks: tuple[Tensor | None, ...]
    lengths: tuple[int, ...]
    batch: int
    biases: tuple[Tensor | None, ...] = ()
    shifts: tuple[Tensor | None, ...] = ()

    def bias(self, group: int) -> Tensor | None:
        """What is added in the layers of a group."""
        return self.biases[group] if self.biases else None


def remember(cache: Any, state: LayerState) -> None:
    """Note on a cache what was dropped; it lives exactly as long as the cache does."""
    setattr(cache, _STATE, state)


def remembered(cache: Any) -> LayerState | None:
    """The state on a cache, if it holds unequal lengths now."""
    state = getattr(cache, _STATE, None)
    if state is not None and filled(cache) == 0:
        delattr(cache, _STATE)  # a static cache that was reset for another prompt
        return None
    return state


def filled(cache: Any, layer: int = 0) -> int:
    """How many entries a layer of a cache holds; None holds none."""
    return int(cache.get_seq_length(layer)) if cache is not None else 0


class GroupMasks:
    """2-D masks over the entries of each group, in one run of the language model.

    Args:
        state: what the cache remembers.
        mask: the mask given to the language model.
        before: entries in the cache before this run, per group.
        batch: rows of this run.
        new: entries of this run before any cut.
        static: whether the cache is static, so that a prepared 4-D mask is generate's own.
    """

    def __init__(
        self,
        state: LayerState | None,
        mask: Any,
        before: tuple[int, ...],
        batch: int,
        new: int,
        static: bool,
    ) -> None:
        self._state = state
        self._before = before
        self._batch = batch
        self._new = new
        if state is not None:
            _check(state, before, batch)
        self._full = _two_dimensional(mask, batch, before[0] + new, static)

    def of(self, group: int, new: Tensor | None = None) -> Tensor | None:
        """`bool[B, before + new]` of a group, None where all are ones.

        `new` is the mask of this run's entries if some were dropped, by default the given one.
        """
        if new is not None:
            return _joined([self.held(group), (new, new.shape[1])], self._batch)
        given = None if self._full is None else self._full[:, self._before[0] :]
        return _joined([self.held(group), (given, self._new)], self._batch)

    def held(self, group: int) -> tuple[Tensor | None, int]:
        """The mask of what a group's layers held before this run."""
        state, before, first = self._state, self._before[group], self._before[0]
        if state is None:
            return (None if self._full is None else self._full[:, :before]), before
        start, length = state.masks[group], state.lengths[group]
        behind = before - length
        tail = None if self._full is None else self._full[:, first - behind : first]
        return _joined([(start, length), (tail, behind)], self._batch), before


def _check(state: LayerState, before: tuple[int, ...], batch: int) -> None:
    """Refuse what a cache with unequal lengths cannot go through."""
    if batch != state.batch:
        raise UnsupportedModeError(
            f"a step of batch {batch} continues a cache of batch {state.batch} whose layers hold "
            "unequal lengths, expected the same batch: use generate() for beams"
        )
    behind = [now - then for now, then in zip(before, state.lengths, strict=True)]
    if min(behind) < 0:
        raise UnsupportedModeError(
            f"{-min(behind)} entries too many were taken back from a cache, expected only such as "
            "stand behind what was dropped between layers: start from a fresh cache"
        )
    if len(set(behind)) > 1:
        raise UnsupportedModeError(
            f"the layers of this cache hold {before} entries, expected {state.lengths} and the "
            "same number more in each: a call on it was broken off; start from a fresh cache"
        )


def _two_dimensional(mask: Any, batch: int, width: int, static: bool) -> Tensor | None:
    """The mask over the entries of the first group, `bool[B, width]`; None: all ones."""
    if isinstance(mask, dict):
        mask = mask.get("full_attention")
    if mask is None:
        return None
    if isinstance(mask, Tensor) and static:
        # generate prepares it for the whole cache: its last query sees all that is not padding
        if mask.dim() == 4:
            mask = mask[:, 0, -1]
            mask = mask if mask.dtype == torch.bool else mask == 0
        mask = mask[:, :width].expand(batch, -1)
    if isinstance(mask, Tensor) and mask.shape == (batch, width):
        return mask != 0
    got = tuple(mask.shape) if isinstance(mask, Tensor) else type(mask).__name__
    raise InputError(
        f"the attention mask of this run is {got}, expected {(batch, width)} with a method that "
        "drops tokens between decoder layers: pass a 2-D mask over all entries so far"
    )


def _joined(parts: Sequence[tuple[Tensor | None, int]], batch: int) -> Tensor | None:
    """Masks side by side; None stands for as many ones."""
    given = [mask for mask, _ in parts if mask is not None]
    if not given:
        return None
    device = given[-1].device
    return torch.cat(
        [
            torch.ones(batch, width, dtype=torch.bool, device=device)
            if mask is None
            else mask.to(device)
            for mask, width in parts
        ],
        1,
    )
