"""One run of the vision tower: whose rows they are, and how their units become LLM tokens."""

from __future__ import annotations

import math
from collections.abc import Mapping
from functools import cached_property
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from vtc.adapters.base import Adapter, Encoder, Visual
from vtc.dispatch import constant


class Run:
    """The images, or the videos, that one run of the tower encodes.

    Rows are crops, tiles or frames `[R, c + P, width]`; in a packed tower a row is an image or a
    video, and all of them stand in one sequence.

    Args:
        adapter: describes the model.
        encoder: its tower.
        visuals: all images and videos of the call.
        members: which of them this run encodes.
        inputs: the call's keyword inputs.
    """

    def __init__(
        self,
        adapter: Adapter,
        encoder: Encoder,
        visuals: tuple[Visual, ...],
        members: list[int],
        inputs: Mapping[str, Any],
    ) -> None:
        self.adapter, self.encoder, self.inputs = adapter, encoder, inputs
        self.members = members
        self.visuals = [visuals[i] for i in members]
        self.patches_per_unit = adapter.patches_per_token

    @cached_property
    def image(self) -> Tensor:
        """`int64[R]`: the image of each row, counted over the call."""
        return torch.tensor(
            [i for i, v in zip(self.members, self.visuals, strict=True) for _ in range(v.rows)]
        )

    @cached_property
    def order(self) -> Tensor | None:
        """In a packed tower: which unit stands where; None: in order."""
        m = self.adapter.patches_per_token
        side = round(m**0.5)
        grids = [[t, h * side, w * side] for v in self.visuals for t, h, w in v.grids]
        return self.adapter.unit_order(torch.tensor(grids))

    @cached_property
    def lengths(self) -> Tensor:
        """Packed: units of each row."""
        return torch.tensor([v.tokens for v in self.visuals])

    @property
    def patches_valid(self) -> Tensor | None:
        """`bool[R, P]` in a packed tower; None: rows are all of one length."""
        if not self.encoder.packed:
            return None
        patches = self.lengths * self.patches_per_unit
        return constant(torch.arange(int(patches.max())) < patches[:, None], self._device)

    _device: torch.device = torch.device("cpu")

    def assembled(self, chunks: list[Tensor]) -> Tensor:
        """What attention calls of one block saw, `[R, H, c + P, d]`, in the order of the rows."""
        self._device = chunks[0].device
        if not self.encoder.packed:
            return chunks[0]
        whole = torch.cat(chunks, 2)[0].transpose(0, 1)  # [T, H, d]
        if self.order is not None:
            units = whole.unflatten(0, (-1, self.patches_per_unit))
            whole = units[constant(self.order.argsort(), whole.device)].flatten(0, 1)
        parts = whole.split((self.lengths * self.patches_per_unit).tolist())
        return pad_sequence(list(parts), batch_first=True).transpose(1, 2)

    def by_unit(self, values: Tensor) -> Tensor:
        """Numbers of patches `[R, P]` as means over units `[R, U]`."""
        m = self.patches_per_unit
        if m == 1:
            return values
        if (units := self.units(values.shape[1])) is not None:
            return values[:, constant(units, values.device)].mean(-1)
        together: Tensor = values.unflatten(1, (-1, m))
        return together.mean(-1)

    def units(self, patches: int) -> Tensor | None:
        """Which patches of a row make up each unit; None: they stand together."""
        return None if self.encoder.packed else self.adapter.units(patches)

    def split(self, values: Tensor) -> list[Tensor]:
        """Numbers of units `[C, R, U]` by image, `[C, rows, U]`; packed rows lose their padding."""
        if self.encoder.packed:
            lengths = self.lengths.tolist()
            return [values[:, r : r + 1, :n] for r, n in enumerate(lengths)]
        return list(values.split([v.rows for v in self.visuals], 1))

    def to_tokens(self, values: Tensor) -> list[Tensor]:
        """Numbers of units `[C, R, U]` as those of LLM tokens, `[C, N]` for each image."""
        return [
            self._packed(part, i, visual)
            for i, visual, part in zip(self.members, self.visuals, self.split(values), strict=True)
        ]

    def encoder_rows(self) -> list[Tensor]:
        """Which row of its image or video each LLM token is of, `int64[N]` each on the CPU; the one
        that most of it is of where it is made of several. In a packed tower: which frame."""
        return [
            self._rows_of(i, v).argmax(0) for i, v in zip(self.members, self.visuals, strict=True)
        ]

    def _rows_of(self, which: int, visual: Visual) -> Tensor:
        """How much of each row is in each LLM token, `[C, N]`."""
        if len(visual.grids) < visual.rows and not visual.video:
            # a thumbnail, whose grid is that of every crop, and a canvas of crops
            units = math.prod(visual.grids[0])
            shares = torch.eye(visual.rows)[..., None].expand(-1, -1, units)
            return self._packed(shares, which, visual)
        rows = [h * w for t, h, w in visual.grids for _ in range(t)]
        return torch.eye(len(rows)).repeat_interleave(torch.tensor(rows), 1)

    def _packed(self, values: Tensor, which: int, visual: Visual) -> Tensor:
        """Numbers of units `[C, R, U]` of an image or video as those of its LLM tokens."""
        if not self.adapter.tiled or self.adapter.blends(self.inputs, which, visual):
            return self.adapter.pack(values, self.inputs, which)
        # which unit a token is follows from sizes: stock packing looks at numbers for that
        units = torch.arange(values[0].numel(), dtype=torch.float32).view(1, *values.shape[1:])
        index = self.adapter.pack(units, self.inputs, which)[0].long()
        return values.flatten(1)[:, constant(index, values.device)]


def runs_of(
    adapter: Adapter, encoder: Encoder, visuals: tuple[Visual, ...], inputs: Mapping[str, Any]
) -> list[Run]:
    """The runs of the tower in a call: over the images, then over the videos."""
    found = []
    for video in (False, True):
        if members := [i for i, v in enumerate(visuals) if v.video == video]:
            found.append(Run(adapter, encoder, visuals, members, inputs))
    return found
