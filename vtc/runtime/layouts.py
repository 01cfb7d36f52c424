"""Which patches are still in the encoder's sequence: in rows of their own, or packed in one."""

from __future__ import annotations

from functools import cached_property
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from vtc.adapters.base import Encoder
from vtc.runtime.rows import Run


class _Layout:
    """Units of each row that are left. R rows, U units of each (padded), m patches per unit."""

    moving: tuple[str, ...] = ("index", "valid")

    def __init__(self, encoder: Encoder, run: Run, widths: Tensor, device: torch.device) -> None:
        self.run, self.encoder, self.device = run, encoder, device
        self.m = run.patches_per_unit
        self.units = widths
        self.full = int(widths.max())
        index = torch.arange(self.full).repeat(len(widths), 1)
        valid = index < widths[:, None]
        self.index, self.valid = self._put(index.masked_fill(~valid, 0)), self._put(valid)
        self.ragged = False
        self._in_force: dict[int, tuple[Tensor, Tensor]] = {}

    def _put(self, known: Tensor) -> Tensor:
        """What the host knows, on the device."""
        return known.to(self.device)

    def follow(self, device: torch.device) -> None:
        """Go where the next block's input is: a tower may be spread over devices."""
        if device != self.device:
            self.device = device
            for name in self.moving:
                setattr(self, name, getattr(self, name).to(device))
            self.__dict__.pop("token_units", None)

    @property
    def last(self) -> int:
        """The last block that was entered."""
        return max(self._in_force)

    def entering(self, block: int) -> None:
        """Note what is left as the state within `block`."""
        self._in_force[block] = (self.index, self.valid)

    @cached_property
    def token_units(self) -> list[Tensor]:
        """For each image, which unit of the run (row · U + unit) each LLM token is made of."""
        return [p.to(self.device) for p in self.known_units]

    @cached_property
    def known_units(self) -> list[Tensor]:
        """The same on the CPU."""
        rows = len(self.units)
        # in double precision, every number of a unit is exact
        numbers = torch.arange(float(rows * self.full), dtype=torch.float64)
        packed = self.run.to_tokens(numbers.view(1, rows, self.full))
        return [p[0].round().long() for p in packed]

    @cached_property
    def reachable(self) -> Tensor:
        """`int64[R]` on the CPU: how many units of each row LLM tokens are made of."""
        rows = torch.cat(self.known_units) // self.full
        return rows.bincount(minlength=len(self.units))

    @property
    def reaching(self) -> Tensor:
        """`bool[R, U]`: what is left that LLM tokens are made of (padding of a canvas is not)."""
        reach = torch.zeros(len(self.units) * self.full, dtype=torch.bool, device=self.device)
        reach[torch.cat(self.token_units)] = True
        return self.valid & reach.view(-1, self.full).gather(1, self.index)

    def alive(self, block: int) -> Tensor:
        """`bool[R, U]` over all units: those that were left within `block`."""
        index, valid = (x.to(self.device) for x in self._in_force[block])
        alive = torch.zeros(len(index), self.full + 1, dtype=torch.bool, device=self.device)
        alive.scatter_(1, index.masked_fill(~valid, self.full), True)
        return alive[:, :-1]

    def spread(self, values: Tensor) -> Tensor:
        """Numbers `[R, U]` of the units that are left among all units, 0 for the others."""
        out = values.new_zeros(len(values), self.full + 1)
        index = self.index.masked_fill(~self.valid, self.full)
        return out.scatter(1, index.to(values.device), values)[:, :-1]

    def patch_masks(self, alive: Tensor) -> list[Tensor]:
        """For each image, which of its original patches are left: `bool[t, h, w]` of its rows."""
        raise NotImplementedError

    def _shrunk(self, keep: Tensor) -> Tensor:
        """Take over `bool[R, U]`; returns the places `int64[R, K]` of what is left."""
        counts = keep.sum(1)
        width = int(counts.max())
        place = torch.arange(keep.shape[1], device=self.device).expand_as(keep)
        order = place.masked_fill(~keep, keep.shape[1]).sort(1).values[:, :width]
        self.valid = torch.arange(width, device=self.device) < counts[:, None]
        self.ragged = int(counts.min()) < width
        order = order.masked_fill(~self.valid, 0)
        self.index = self.index.gather(1, order).masked_fill(~self.valid, 0)
        return order

    def arguments(self, kwargs: dict[str, Any]) -> dict[str, Any]:
        """The keyword arguments of a block for what is left."""
        return kwargs

    def mask(self, query: Tensor) -> Tensor | None:
        """What attention of `query` needs to leave out padding."""
        return None


class RowLayout(_Layout):
    """Rows `[R, c + P, width]`, c = 1 with a [CLS]; the patches of a unit are moved together."""

    moving = ("index", "valid", "raster")

    def __init__(self, encoder: Encoder, run: Run, hidden: Tensor) -> None:
        self.first = int(encoder.has_cls)
        self.total = hidden.shape[1] - self.first
        super().__init__(
            encoder,
            run,
            torch.full((len(hidden),), self.total // run.patches_per_unit),
            hidden.device,
        )
        together = run.units(self.total)
        self.raster = self._put(
            torch.arange(self.total).view(-1, self.m) if together is None else together
        )
        self._together = together is None

    @property
    def patches(self) -> int:
        """Patches in all rows, padding not counted."""
        return int(self.valid.sum()) * self.m

    def ordered(self, hidden: Tensor) -> Tensor:
        """Raster order -> unit by unit."""
        if self._together:
            return hidden
        body = hidden[:, self.first :][:, self.raster.flatten()]
        return torch.cat([hidden[:, : self.first], body], 1)

    def assembled(self, chunks: list[Tensor]) -> Tensor:
        """Queries, keys or values of one block, zeros on padding."""
        (x,) = chunks
        padding = ~self.valid.repeat_interleave(self.m, 1)
        padding = torch.nn.functional.pad(padding, (self.first, 0))
        return x.masked_fill(padding[:, None, :, None], 0)

    def cut(self, hidden: Tensor, keep: Tensor) -> tuple[Tensor, Tensor]:
        """Drop units; returns the shorter rows and the places of what is left."""
        body = hidden[:, self.first :].unflatten(1, (-1, self.m))
        order = self._shrunk(keep)
        rows = torch.arange(len(body), device=body.device)[:, None]
        body = body[rows, order].masked_fill(~self.valid[..., None, None], 0).flatten(1, 2)
        return torch.cat([hidden[:, : self.first], body], 1), order

    def mask(self, query: Tensor) -> Tensor | None:
        """Additive, where rows have different lengths."""
        if not self.ragged:
            return None
        seen = self.valid.repeat_interleave(self.m, 1)
        seen = torch.nn.functional.pad(seen, (self.first, 0), value=True)
        mask = query.new_zeros(seen.shape)
        return mask.masked_fill(~seen.to(mask.device), torch.finfo(mask.dtype).min)[:, None, None]

    def patch_masks(self, alive: Tensor) -> list[Tensor]:
        """Rows `[rows, side, side]`, patches in raster order."""
        masks = torch.zeros(len(alive), self.total, dtype=torch.bool, device=self.device)
        masks[:, self.raster.flatten().to(self.device)] = alive.repeat_interleave(self.m, 1)
        return by_image(masks, [v.rows for v in self.run.visuals])

    def restore_outputs(self, output: Any) -> None:
        """Fill up the hidden states that the tower gives, in place."""
        output.last_hidden_state = self._filled(output.last_hidden_state, self.last)
        states = getattr(output, "hidden_states", None)
        if states is not None:
            # entry i is what block i − 1 gave; the first is what block 0 was given
            output.hidden_states = tuple(
                None if x is None else self._filled(x, max(i - 1, 0)) for i, x in enumerate(states)
            )

    def _filled(self, hidden: Tensor, block: int) -> Tensor:
        index, valid = (x.to(hidden.device) for x in self._in_force[block])
        body = hidden[:, self.first :].unflatten(1, (-1, self.m))
        out = body.new_zeros(len(body), self.total + 1, body.shape[-1])
        places = self.raster.to(index.device)[index].masked_fill(
            ~valid[..., None], self.total
        )  # [R, K, m]
        rows = torch.arange(len(body), device=body.device)[:, None]
        out = out.index_put((rows, places.flatten(1)), body.flatten(1, 2))
        return torch.cat([hidden[:, : self.first], out[:, :-1]], 1)


def by_image(masks: Tensor, rows: list[int]) -> list[Tensor]:
    """Patches of rows `bool[R, P]`, in raster order, as `bool[rows, side, side]` of each image."""
    side = round(masks.shape[1] ** 0.5)
    shape = (side, side) if side * side == masks.shape[1] else (1, masks.shape[1])
    return [part.unflatten(1, shape) for part in masks.split(rows)]


class PackedLayout(_Layout):
    """One sequence `[T, width]` in which rows stand one behind the other, or in windows."""

    moving = ("index", "valid", "at", "places", "where")

    def __init__(self, encoder: Encoder, run: Run, hidden: Tensor) -> None:
        super().__init__(encoder, run, run.lengths, hidden.device)
        total = int(run.lengths.sum())
        order = torch.arange(total) if run.order is None else run.order
        self.at = order.to(hidden.device)  # the unit at each place that is left
        self.places = torch.arange(total, device=hidden.device)  # their original places
        self.total = total
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
        found = []
        side = round(self.m**0.5)
        for row, visual in zip(alive, self.run.visuals, strict=True):
            t, h, w = visual.grids[0]
            mask = row[: visual.tokens].repeat_interleave(self.m)
            found.append(mask.view(t, h * side, w * side))
        return found

    def restored(self, hidden: Tensor) -> Tensor:
        """The whole sequence, zeros where units were dropped."""
        if len(self.at) == self.total:
            return hidden
        units: Tensor = hidden.unflatten(0, (-1, self.m))
        out = units.new_zeros(self.total, *units.shape[1:])
        return out.index_put((self.places,), units).flatten(0, 1)
