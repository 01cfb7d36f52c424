"""Which patches are still in the encoder's sequence, in rows of their own."""

from __future__ import annotations

from functools import cached_property
from math import isqrt
from typing import Any

import torch
from torch import Tensor

from vtc.adapters.base import Encoder
from vtc.errors import UnsupportedModeError
from vtc.runtime.rows import Run


class Layout:
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
        self.bias: Tensor | None = None  # `[R, U]`, added to attention on each unit
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
            self.bias = None if self.bias is None else self.bias.to(device)
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
        if self.bias is not None:
            self.bias = self.bias.gather(1, order).masked_fill(~self.valid, 0)
        return order

    def weigh(self, size: Tensor, order: Tensor) -> None:
        """From now on units count for `size [R, U]` (before the last cut) in attention."""
        bias = size.float().log().to(self.device).gather(1, order)
        self.bias = bias.masked_fill(~self.valid, 0)

    def unit_pixels(self, pixels: list[Tensor]) -> Tensor:
        """Of the pixel values of each image, those of each unit, `[R, U, v]`."""
        raise NotImplementedError

    def unit_cells(self) -> Tensor:
        """The frame, row and column of each unit in the grid of its row, `int64[R, U, 3]` on the
        CPU; −1 on padding."""
        raise NotImplementedError

    def merge(self, hidden: Tensor, into: Tensor, weight: Tensor) -> Tensor:
        """Hidden states in which units are weighted sums of others, in float32; what is not merged
        into anything keeps its own."""
        raise NotImplementedError

    def arguments(self, kwargs: dict[str, Any]) -> dict[str, Any]:
        """The keyword arguments of a block for what is left."""
        return kwargs

    def mask(self, query: Tensor) -> Tensor | None:
        """What attention of `query` needs to leave out padding."""
        return None


class RowLayout(Layout):
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

    @property
    def _side(self) -> int:
        side = isqrt(self.total)
        if side * side != self.total:
            raise UnsupportedModeError(
                f"rows of {self.total} patches were to be seen as squares, expected square crops: "
                "choose a method that does not look at pixels"
            )
        return side

    def unit_pixels(self, pixels: list[Tensor]) -> Tensor:
        """See above; rows are `[3, H, W]` each."""
        rows = torch.cat([x if x.dim() == 4 else x[None] for x in pixels])
        size = rows.shape[-1] // self._side
        patches = torch.nn.functional.unfold(rows.float(), size, stride=size)  # [R, v, P]
        return patches.transpose(1, 2)[:, self.raster.to(patches.device)].flatten(2)

    def unit_cells(self) -> Tensor:
        """See above."""
        first, across = self.raster.cpu().amin(1), round(self.m**0.5)
        y, x = first // self._side // across, first % self._side // across
        cells = torch.stack([torch.zeros_like(y), y, x], -1)
        return cells.expand(len(self.units), -1, -1)

    def merge(self, hidden: Tensor, into: Tensor, weight: Tensor) -> Tensor:
        """See above; the [CLS] is left alone."""
        body = hidden[:, self.first :].unflatten(1, (-1, self.m))
        sums = sums_of(body, into.to(body.device), weight.to(body.device))
        return torch.cat([hidden[:, : self.first], sums.flatten(1, 2)], 1)

    def mask(self, query: Tensor) -> Tensor | None:
        """Additive, where rows have different lengths or units count for several."""
        if not self.ragged and self.bias is None:
            return None
        seen = self.valid.repeat_interleave(self.m, 1)
        seen = torch.nn.functional.pad(seen, (self.first, 0), value=True)
        mask = query.new_zeros(seen.shape)
        if self.bias is not None:
            bias = self.bias.to(mask).repeat_interleave(self.m, 1)
            mask[:, self.first :] = bias
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


def sums_of(units: Tensor, into: Tensor, weight: Tensor) -> Tensor:
    """Of units `[R, U, m, width]` the weighted sums at the places `into [R, U]`, in float32; at
    places that nothing goes to, what was there."""
    rows = torch.arange(len(units), device=units.device)[:, None].expand_as(into)
    weight = weight.masked_fill(~weight.isfinite(), 0)
    terms = units.float() * weight[..., None, None]
    sums = torch.zeros_like(terms).index_put((rows, into), terms, accumulate=True)
    filled = torch.zeros_like(weight).index_put((rows, into), weight, accumulate=True) != 0
    return torch.where(filled[..., None, None], sums.to(units.dtype), units)
