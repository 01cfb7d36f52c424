"""Where the visual tokens of a call stand in its rows of ids."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from vtc.adapters.base import Adapter, Grid
from vtc.errors import InputError


@dataclass(frozen=True, eq=False)
class Images:
    """The images of one call. Tensors are on the CPU: they are known before the encoder runs.

    Attributes:
        grids: `(t, h, w)` of each image.
        rows: `int64[G]`, the batch row of each.
        columns: `int64[G, N]`, where its tokens stand in that row, 0 on padding.
        valid: `bool[G, N]`.
    """

    grids: tuple[Grid, ...]
    rows: Tensor
    columns: Tensor
    valid: Tensor
    _moved: dict[torch.device, Images] = field(default_factory=dict, init=False, repr=False)

    @property
    def lengths(self) -> tuple[int, ...]:
        """Tokens of each image."""
        return tuple(t * h * w for t, h, w in self.grids)

    @property
    def parent(self) -> Tensor:
        """`int64[G, 2]`: image and batch row of each group."""
        return torch.stack([torch.arange(len(self.grids)), self.rows], -1)

    def to(self, device: torch.device) -> Images:
        """The same on a device, copied there once."""
        if device not in self._moved:
            rows, columns, valid = (t.to(device) for t in (self.rows, self.columns, self.valid))
            self._moved[device] = replace(self, rows=rows, columns=columns, valid=valid)
        return self._moved[device]


def find_images(adapter: Adapter, inputs: Mapping[str, Any], placeholders: Tensor) -> Images:
    """The images among keyword inputs of the model, whose tokens stand at `bool[B, S]`.

    Raises:
        InputError: placeholders and pixels do not match.
    """
    grids = adapter.grids(inputs)
    if not grids:
        raise InputError(
            "pixel_values hold no image, expected at least one: leave pixel_values out of a call "
            "without images"
        )
    lengths = [t * h * w for t, h, w in grids]
    # one copy to the CPU, before the encoder is under way
    places = placeholders.cpu().nonzero()  # [T, 2], row-major
    if len(places) != sum(lengths):
        raise InputError(
            f"input_ids hold {len(places)} image placeholders, expected {sum(lengths)} for "
            f"{len(grids)} images of {sorted(set(lengths))} tokens: give one <image> per image and "
            f"let the processor expand it"
        )
    parts = places.split(lengths)
    if any((part[:, 0] != part[0, 0]).any() for part in parts):
        raise InputError(
            "an image's placeholders are spread over two rows, expected each image in one row: "
            "order the images as their placeholders stand in the batch"
        )
    columns = pad_sequence([part[:, 1] for part in parts], batch_first=True)
    return Images(
        grids=tuple(grids),
        rows=torch.stack([part[0, 0] for part in parts]),
        columns=columns,
        valid=torch.arange(columns.shape[1]) < torch.tensor(lengths)[:, None],
    )
