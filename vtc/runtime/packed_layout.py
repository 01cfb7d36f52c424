"""Which patches are still in the sequence of an encoder that packs all rows in one."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from vtc.adapters.base import Encoder, Visual
from vtc.runtime.layouts import Layout, sums_of
from vtc.runtime.rows import Run


class PackedLayout(Layout):
    """One sequence `[T, width]` in which rows stand one behind the other, or in windows."""

    moving: tuple[str, ...] = ("index", "valid", "at", "places", "where")

    def __init__(self, encoder: Encoder, run: Run, hidden: Tensor) -> None:
        super().__init__(encoder, run, run.lengths, hidden.device)
        total = int(run.lengths.sum())
        order = torch.arange(total) if run.order is None else run.order
        self.at = order.to(hidden.device)  # the unit at each place that is left
        self.places = torch.arange(total, device=hidden.device)  # their original places
        self.total = total
        self._attended = 0
        self._locate()

    @property
    def patches(self) -> int:
        """Patches in the sequence."""
        return len(self.at) * self.m

    def ordered(self, hidden: Tensor) -> Tensor:
        """As it is."""
        return hidden

    def _locate(self) -> None:
        """Where each row's units stand among the places that are left: `int64[R, U]`."""
        by_unit = self.at.argsort()
        counts = self.valid.sum(1).tolist()
        self.where = pad_sequence(list(by_unit.split(counts)), batch_first=True)

    def assembled(self, chunks: list[Tensor]) -> Tensor:
        """Queries, keys or values `[1, H, ·, d]` of the segments as rows `[R, H, U·m, d]`."""
        x: Tensor = torch.cat(chunks, 2)[0].transpose(0, 1)
        x = x.unflatten(0, (-1, self.m))  # [n, m, H, d]
        rows = x[self.where].masked_fill(~self.valid[..., None, None, None], 0)
        return rows.flatten(1, 2).transpose(1, 2)

    def cut(self, hidden: Tensor, keep: Tensor) -> tuple[Tensor, Tensor]:
        """Drop units; returns the shorter sequence and the places of what is left in its row."""
        stays = torch.zeros(len(self.at), dtype=torch.bool, device=self.device)
        stays[self.where[keep]] = True
        hidden = hidden.unflatten(0, (-1, self.m))[stays].flatten(0, 1)
        self.at, self.places = self.at[stays], self.places[stays]
        order = self._shrunk(keep)
        self._locate()
        return hidden, order

    def unit_pixels(self, pixels: list[Tensor]) -> Tensor:
        """See above; they come as patches, those of a unit together."""
        units = [x.unflatten(0, (-1, self.m)).flatten(1) for x in pixels]
        return pad_sequence(units, batch_first=True)

    def unit_cells(self) -> Tensor:
        """See above."""
        cells = [
            torch.cartesian_prod(*(torch.arange(n) for n in visual.grids[0])).view(-1, 3)
            for visual in self.run.visuals
        ]
        return pad_sequence(cells, batch_first=True, padding_value=-1)

    def merge(self, hidden: Tensor, into: Tensor, weight: Tensor) -> Tensor:
        """See above."""
        units: Tensor = hidden.unflatten(0, (-1, self.m))
        sums = sums_of(units[self.where], into.to(hidden.device), weight.to(hidden.device))
        return units.index_put((self.where[self.valid],), sums[self.valid]).flatten(0, 1)

    def entering(self, block: int) -> None:
        """See above; attention begins with the first segment."""
        super().entering(block)
        self._attended = 0

    def mask(self, query: Tensor) -> Tensor | None:
        """Additive, of the segment that attends next, where units count for several."""
        if self.bias is None:
            return None
        flat = torch.zeros(len(self.at), device=self.bias.device)
        flat[self.where[self.valid]] = self.bias[self.valid]
        first, self._attended = self._attended, self._attended + query.shape[2] // self.m
        own = flat[first : self._attended].to(query).repeat_interleave(self.m)
        return own.expand(len(query), 1, 1, -1)

    def arguments(self, kwargs: dict[str, Any]) -> dict[str, Any]:
        """Segment bounds and rotary positions of what is left."""
        if len(self.at) == self.total:
            return kwargs
        alive = torch.zeros(self.total + 1, dtype=torch.long, device=self.device)
        alive[self.places + 1] = self.m
        bounds = kwargs["cu_seqlens"]
        below = alive.cumsum(0).to(bounds.device)
        bounds = below[bounds.long() // self.m].unique_consecutive().to(bounds.dtype)
        patch = (self.places[:, None] * self.m + torch.arange(self.m, device=self.device)).flatten()
        rotary = tuple(x[patch.to(x.device)] for x in kwargs["position_embeddings"])
        out = {**kwargs, "cu_seqlens": bounds, "position_embeddings": rotary}
        if kwargs.get("max_seqlen") is not None:
            out["max_seqlen"] = int(bounds.diff().max())
        return out

    def patch_masks(self, alive: Tensor) -> list[Tensor]:
        """Frames `[t, h, w]`; patches stand as in the pixel input, those of a token together."""
        return frames_of(alive.repeat_interleave(self.m, 1), self.run.visuals, self.m)

    def restored(self, hidden: Tensor) -> Tensor:
        """The whole sequence, zeros where units were dropped."""
        if len(self.at) == self.total:
            return hidden
        units: Tensor = hidden.unflatten(0, (-1, self.m))
        out = units.new_zeros(self.total, *units.shape[1:])
        return out.index_put((self.places,), units).flatten(0, 1)


def frames_of(masks: Tensor, visuals: Sequence[Visual], patches: int) -> list[Tensor]:
    """Patches `bool[R, P]` of each image, as in the pixel input, `patches` to a token, as frames
    `bool[t, h, w]`."""
    found, side = [], round(patches**0.5)
    for row, visual in zip(masks, visuals, strict=True):
        t, h, w = visual.grids[0]
        found.append(row[: visual.tokens * patches].view(t, h * side, w * side))
    return found
