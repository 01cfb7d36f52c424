"""Where the visual tokens of a call stand in its rows of ids."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from vtc.adapters.base import Adapter, Grid
from vtc.errors import InputError


@dataclass(frozen=True, eq=False)
class Images:
    """The images of one call.

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

    @property
    def lengths(self) -> tuple[int, ...]:
        """Tokens of each image."""
        return tuple(t * h * w for t, h, w in self.grids)

    @property
    def parent(self) -> Tensor:
        """`int64[G, 2]` on the CPU: image and batch row of each group."""
        return torch.stack([torch.arange(len(self.grids)), self.rows.cpu()], -1)


def find_images(adapter: Adapter, inputs: Mapping[str, Any], input_ids: Tensor) -> Images:
    """The images among keyword inputs of the model.

    Raises:
        InputError: placeholders and pixels do not match.
    """
    grids = adapter.grids(inputs)
    lengths = [t * h * w for t, h, w in grids]
    places = (input_ids == adapter.image_token_id).nonzero()  # [T, 2], row-major
    if len(places) != sum(lengths):
        raise InputError(
            f"input_ids hold {len(places)} image placeholders, expected {sum(lengths)} for "
            f"{len(grids)} images of {sorted(set(lengths))} tokens: give one <image> per image and "
            f"let the processor expand it"
        )
    parts = places.split(lengths)
    if any(len(part) and bool((part[:, 0] != part[0, 0]).any()) for part in parts):
        raise InputError(
            "an image's placeholders are spread over two rows, expected each image in one row: "
            "order the images as their placeholders stand in the batch"
        )
    return Images(
        grids=tuple(grids),
        rows=torch.stack([part[0, 0] for part in parts]),
        columns=pad_sequence([part[:, 1] for part in parts], batch_first=True),
        valid=pad_sequence(
            [torch.ones_like(part[:, 1], dtype=torch.bool) for part in parts], batch_first=True
        ),
    )
