"""Where the visual tokens of a call stand in its rows of ids."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import groupby
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from vtc.adapters.base import Adapter, Grid, Visual
from vtc.errors import InputError


@dataclass(frozen=True, eq=False)
class Images:
    """The images, then the videos of one call. Tensors are on the CPU: they are known before the
    encoder runs.

    Attributes:
        visuals: each of them.
        rows: `int64[G]`, the batch row of each.
        columns: `int64[G, N]`, where its tokens stand in that row, 0 on padding.
        valid: `bool[G, N]`.
        newlines: `int64[M, 5]`: batch row and column of each newline token, its image, and the
            range of tokens (first, end) that it ends.
        places: `int64[T, 2]`: batch row and column of everything that the encoder gives, newlines
            too, image by image.
        at: `int64[B, S]`, what stands in each column: 0 is text, 1 + g·N + n token n of image g,
            1 + G·N + m newline token m.
        owners: `int64[1 + G·N + M]`, the image that each of those belongs to; −1 for text and
            newline tokens.
        given: `int64[1 + G·N + M]`, which of the T that the encoder gives each is; 0 for text.
    """

    visuals: tuple[Visual, ...]
    rows: Tensor
    columns: Tensor
    valid: Tensor
    newlines: Tensor
    places: Tensor
    at: Tensor
    owners: Tensor
    given: Tensor
    _moved: dict[torch.device, Images] = field(default_factory=dict, init=False, repr=False)

    @property
    def grids(self) -> tuple[Grid, ...]:
        """`(t, h, w)` of each; one of several parts counts as a row of all its tokens."""
        return tuple(v.grids[0] if len(v.grids) == 1 else (1, 1, v.tokens) for v in self.visuals)

    @property
    def parts(self) -> tuple[tuple[Grid, ...], ...]:
        """The grids of the parts of each."""
        return tuple(v.grids for v in self.visuals)

    @property
    def overviews(self) -> tuple[tuple[int, int], ...]:
        """The token range of each that shows the whole picture."""
        found = []
        for v in self.visuals:
            sizes = [t * h * w for t, h, w in v.grids]
            start = sum(sizes[: v.overview or 0])
            whole = v.tokens if v.overview is None else sizes[v.overview]
            found.append((start, start + whole))
        return tuple(found)

    @property
    def lengths(self) -> tuple[int, ...]:
        """Tokens of each."""
        return tuple(v.tokens for v in self.visuals)

    @property
    def parent(self) -> Tensor:
        """`int64[G, 2]`: image and batch row of each group."""
        return torch.stack([torch.arange(len(self.visuals)), self.rows], -1)

    def to(self, device: torch.device) -> Images:
        """The same on a device, copied there once."""
        if device not in self._moved:
            names = [n for n, x in vars(self).items() if isinstance(x, Tensor)]
            # what one call makes under inference_mode, another could not save for a backward pass
            with torch.inference_mode(False):
                moved = {name: getattr(self, name).to(device) for name in names}
            self._moved[device] = replace(self, **moved)
        return self._moved[device]


def find_images(
    adapter: Adapter, inputs: Mapping[str, Any], image: Tensor, video: Tensor | None
) -> Images:
    """The images and videos among keyword inputs of the model, whose tokens stand at `bool[B, S]`.

    Raises:
        InputError: placeholders and pixels do not match.
    """
    # one copy to the CPU, before the encoder is under way
    image = image.cpu()
    marks = _bytes(image)
    visuals = tuple(adapter.visuals(inputs, list(_runs(marks, tuple(image.shape)))))
    if not visuals:
        raise InputError(
            "pixel_values hold no image, expected at least one: leave pixel_values out of a call "
            "without images"
        )
    clips = None if video is None else _bytes(video.cpu())
    known = _found(marks, clips, tuple(image.shape), visuals)
    # its own object for each call, with the copies on devices that others made
    found = replace(known)
    object.__setattr__(found, "_moved", known._moved)
    return found


def _bytes(places: Tensor) -> bytes:
    return places.contiguous().numpy().tobytes()


def _places_of(marks: bytes, shape: tuple[int, ...]) -> Tensor:
    return torch.frombuffer(bytearray(marks), dtype=torch.bool).view(shape)


@functools.lru_cache(maxsize=128)
def _found(
    image: bytes, video: bytes | None, shape: tuple[int, ...], visuals: tuple[Visual, ...]
) -> Images:
    """Images and videos of this layout; prompts of the same layout share it."""
    with torch.inference_mode(False):
        return _new_images(image, video, shape, visuals)


def _new_images(
    image: bytes, video: bytes | None, shape: tuple[int, ...], visuals: tuple[Visual, ...]
) -> Images:
    pictures = [v for v in visuals if not v.video]
    clips = [v for v in visuals if v.video]
    parts = _places(_places_of(image, shape), pictures, "image")
    if video is not None:
        parts += _places(_places_of(video, shape), clips, "video")
    tokens, newlines = [], []
    for g, (v, part) in enumerate(zip(visuals, parts, strict=True)):
        behind = [end + i for i, (_, end) in enumerate(v.newlines)]
        newlines += [
            [*part[at].tolist(), g, *span] for at, span in zip(behind, v.newlines, strict=True)
        ]
        stays = torch.ones(len(part), dtype=torch.bool)
        stays[behind] = False
        tokens.append(part[stays])
    columns = pad_sequence([part[:, 1] for part in tokens], batch_first=True)
    lengths = torch.tensor([v.tokens for v in visuals])
    valid = torch.arange(columns.shape[1]) < lengths[:, None]
    rows = torch.stack([part[0, 0] for part in tokens])
    lines = torch.tensor(newlines, dtype=torch.int64).view(-1, 5)
    places = torch.cat(parts)
    # what can stand in a column, counted as `at` does
    first, end = 1, 1 + valid.numel()
    numbers = torch.arange(first, end).view(valid.shape)
    at = torch.zeros(shape, dtype=torch.int64)
    at[rows[:, None].expand_as(columns)[valid], columns[valid]] = numbers[valid]
    at[lines[:, 0], lines[:, 1]] = torch.arange(end, end + len(lines))
    owners = torch.full((end + len(lines),), -1)
    owners[first:end] = torch.arange(len(visuals)).repeat_interleave(columns.shape[1])
    given = torch.zeros_like(owners)
    given[at[places[:, 0], places[:, 1]]] = torch.arange(len(places))
    return Images(visuals, rows, columns, valid, lines, places, at, owners, given)


@functools.lru_cache(maxsize=128)
def _runs(marks: bytes, shape: tuple[int, ...]) -> tuple[int, ...]:
    """Lengths of the stretches of True, row by row."""
    rows = _places_of(marks, shape).tolist()
    return tuple(len(list(group)) for row in rows for there, group in groupby(row) if there)


def _places(placeholders: Tensor, visuals: Sequence[Visual], what: str) -> list[Tensor]:
    """(row, column) of every token of each image or video, newlines too."""
    lengths = [v.tokens + len(v.newlines) for v in visuals]
    places = placeholders.nonzero()  # [T, 2], row-major
    if len(places) != sum(lengths):
        raise InputError(
            f"input_ids hold {len(places)} {what} placeholders, expected {sum(lengths)} for "
            f"{len(visuals)} {what}s of {sorted(set(lengths))} tokens: give one <{what}> per "
            f"{what} and let the processor expand it"
        )
    parts = places.split(lengths)
    if any((part[:, 0] != part[0, 0]).any() for part in parts):
        raise InputError(
            f"an {what}'s placeholders are spread over two rows, expected each {what} in one row: "
            f"order the {what}s as their placeholders stand in the batch"
        )
    return list(parts)
