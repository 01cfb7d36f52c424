"""What is in a picture: objects, cards and their places, sampled as tensors for a whole batch.

Everything is a function of one matrix of uniform numbers, a row per scene and a named column per
choice, so a test set can fix a column (the answer, the template) and leave the rest to chance.
Letters: B scenes, O = 5 object slots, P = 7 places (the objects, the number card, the digit card).
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import torch
from torch import Tensor

SIZE = 112
CELL = 28
OBJECTS = 5
NUMBER_PLACE, DIGIT_PLACE = 5, 6
PLACES = 7
# half width and half height of the two cards at scale 1
NUMBER_HALF = (11.0, 8.0)
DIGIT_HALF = (8.5, 8.5)

_WIDTHS = {
    "repeat_shape": 1,
    "repeats": 1,
    "objects": 1,
    "second_repeat": 1,
    "has_number": 1,
    "has_digit": 1,
    "number": 1,
    "digit": 1,
    "digit_sample": 1,
    "zero": 1,
    "yes": 1,
    "negative": 1,
    "template": 9,
    "axis": 1,
    "pick": 9 * OBJECTS,
    "pair": OBJECTS * OBJECTS,
    "cells": 16,
    "shapes": 8,
    "colors": 8,
    "jitter": 2 * PLACES,
    "radius": OBJECTS,
    "angle": PLACES,
    "scale": 2,
}


def _columns() -> dict[str, slice]:
    start, columns = 0, {}
    for name, width in _WIDTHS.items():
        columns[name] = slice(start, start + width)
        start += width
    return columns


COLUMNS = _columns()
WIDTH = sum(_WIDTHS.values())


def uniforms(count: int, generator: torch.Generator) -> Tensor:
    """The random numbers of `count` scenes, [B, WIDTH] in [0, 1), on the generator's device."""
    return torch.rand(count, WIDTH, generator=generator, device=generator.device)


@dataclass(frozen=True)
class Scene:
    """A batch of scenes without pixels; the first `present` of the object slots are filled."""

    color: Tensor  # long [B, O]
    shape: Tensor  # long [B, O]
    present: Tensor  # bool [B, P]
    center: Tensor  # float [B, P, 2], x and y in pixels
    half: Tensor  # float [B, P, 2], half extents of the bounding box
    angle: Tensor  # float [B, P], radians
    number: Tensor  # long [B], 10..99
    digit: Tensor  # long [B], 0..9
    repeat_shape: Tensor  # bool [B], the repeated attribute is the shape (else the color)
    repeats: Tensor  # long [B], how many objects share it
    absent_color: Tensor  # long [B], a color that no object has
    absent_shape: Tensor  # long [B]
    u: Tensor  # float [B, WIDTH]

    def __len__(self) -> int:
        """How many scenes."""
        return len(self.u)

    def column(self, name: str) -> Tensor:
        """The random numbers of one choice: [B], or [B, width] for a choice of several numbers."""
        block = self.u[:, COLUMNS[name]]
        return block[:, 0] if block.shape[1] == 1 else block

    def replace(self, **changes: Tensor) -> Scene:
        """The same scenes with some fields changed."""
        return dataclasses.replace(self, **changes)

    def boxes(self) -> Tensor:
        """Bounding boxes x0, y0, x1, y1 of every place, whole pixels in the image, [B, P, 4]."""
        low, high = self.center - self.half, self.center + self.half
        return torch.cat([low.floor(), high.ceil()], -1).clamp(0, SIZE).long()


def sample(u: Tensor, need_number: bool = False, need_digit: bool = False) -> Scene:
    """Scenes from their random numbers `u` [B, WIDTH].

    One attribute (shape or color) is shared by `repeats` objects, and often the other attribute by
    the first and the last one; no two objects are alike in both. So every scene has an object of
    unique shape, one of unique color, and a pair that differs in both.
    """
    get = {name: u[:, block] for name, block in COLUMNS.items()}
    slot = torch.arange(OBJECTS, device=u.device)
    repeats = 1 + (3 * get["repeats"]).long()  # [B, 1]
    fewest = (repeats + 1).clamp(min=2)
    count = fewest + ((OBJECTS + 1 - fewest) * get["objects"]).long()
    filled = slot < count
    first = torch.where(slot < repeats, 0, slot)  # [B, O], the repeated attribute
    twice = (get["second_repeat"] < 0.5) & (count >= 3) & (slot == count - 1)
    second = torch.where(twice, 0, slot.expand_as(first))
    repeat_shape = get["repeat_shape"] < 0.5
    colors, shapes = get["colors"].argsort(-1), get["shapes"].argsort(-1)
    center, half, angle = _layout(get, u)
    has_number = (get["has_number"] < 0.8) | need_number
    has_digit = (get["has_digit"] < 0.8) | need_digit
    return Scene(
        color=colors.gather(1, torch.where(repeat_shape, second, first)),
        shape=shapes.gather(1, torch.where(repeat_shape, first, second)),
        present=torch.cat([filled, has_number, has_digit], 1),
        center=center,
        half=half,
        angle=angle,
        number=10 + (90 * get["number"][:, 0]).long(),
        digit=(10 * get["digit"][:, 0]).long(),
        repeat_shape=repeat_shape[:, 0],
        repeats=repeats[:, 0],
        absent_color=colors[:, 5],
        absent_shape=shapes[:, 5],
        u=u,
    )


def _layout(get: dict[str, Tensor], u: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Centers [B, P, 2], half extents [B, P, 2] and angles [B, P]: one cell of a 4x4 grid each.

    An object is at most 9 pixels in radius and 4.5 off the middle of its 28-pixel cell, so nothing
    overlaps and nothing comes near the middle lines of the picture.
    """
    cell = get["cells"].argsort(-1)[:, :PLACES]
    middle = torch.stack([cell % 4, cell // 4], -1) * CELL + CELL / 2
    reach = u.new_tensor([4.5] * OBJECTS + [0.8, 3.0])
    jitter = (2 * get["jitter"].view(-1, PLACES, 2) - 1) * reach[:, None]
    radius = 6.5 + 2.5 * get["radius"]
    scale = 0.95 + 0.25 * get["scale"]
    cards = torch.stack(
        [scale[:, :1] * u.new_tensor(NUMBER_HALF), scale[:, 1:] * u.new_tensor(DIGIT_HALF)], 1
    )
    half = torch.cat([radius[..., None].expand(-1, -1, 2), cards], 1)
    swing = u.new_tensor([0.2] * OBJECTS + [0.06, 0.06])
    return middle + jitter, half, (2 * get["angle"] - 1) * swing
