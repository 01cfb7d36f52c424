"""The pixels that scenes are made of: background cuts, digits and shape fields of one split."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from vtc.errors import OptionError
from vtc.testbed.vocabulary import RGB, SHAPES

ASSETS = Path(__file__).parent / "assets"
SPLITS = ("train", "validation", "test")
TILE = 128
# resolution of a shape's distance field, and how many radii it spans on each side
FIELD, REACH = 48, 1.5


@dataclass(frozen=True)
class Pictures:
    """Assets of one split as tensors on one device."""

    tiles: Tensor  # uint8 [tiles, 128, 128, 3]
    printed: Tensor  # float [10, 14, 10], ink in [0, 1]
    hand: Tensor  # float [10, most, 8, 8], ink in [0, 1], padded with zeros
    hand_count: Tensor  # long [10], handwritten samples of each digit
    fields: Tensor  # float [shapes, FIELD, FIELD], signed distance in radii
    colors: Tensor  # float [colors, 3]


@cache
def load(split: str, device: str = "cpu") -> Pictures:
    """The assets of `split`: no cut and no handwritten sample is in two splits."""
    if split not in SPLITS:
        raise OptionError(f"split: got {split!r}, expected one of {SPLITS}")
    atlas = torch.from_numpy(np.array(Image.open(ASSETS / f"backgrounds_{split}.jpg")))
    rows, columns = atlas.shape[0] // TILE, atlas.shape[1] // TILE
    tiles = atlas.view(rows, TILE, columns, TILE, 3).transpose(1, 2).flatten(0, 1).contiguous()
    with np.load(ASSETS / "digits.npz") as digits:
        printed = torch.from_numpy(digits["printed"]).float() / 255
        images = torch.from_numpy(digits[f"hand_{split}"]).float() / 16
        labels = torch.from_numpy(digits[f"hand_{split}_label"]).long()
    count = labels.bincount(minlength=10)
    hand = torch.zeros(10, int(count.max()), 8, 8)
    for digit in range(10):
        hand[digit, : int(count[digit])] = images[labels == digit]
    colors = torch.tensor(RGB, dtype=torch.float32)
    parts = (tiles, printed, hand, count, shape_fields(), colors)
    return Pictures(*(part.to(device) for part in parts))


def shape_fields() -> Tensor:
    """Signed distances to the outlines, negative inside, [shapes, FIELD, FIELD]."""
    ramp = ((torch.arange(FIELD) + 0.5) / FIELD * 2 - 1) * REACH
    y, x = torch.meshgrid(ramp, ramp, indexing="ij")
    return torch.stack([_FIELDS[shape](x, y) for shape in SHAPES])


def _box(x: Tensor, y: Tensor, w: float, h: float) -> Tensor:
    dx, dy = x.abs() - w, y.abs() - h
    return torch.hypot(dx.clamp(min=0), dy.clamp(min=0)) + torch.maximum(dx, dy).clamp(max=0)


def _polygon(x: Tensor, y: Tensor, corners: list[tuple[float, float]]) -> Tensor:
    """Distance to a closed polygon, the sign by counting crossings to the right."""
    inside = torch.zeros_like(x, dtype=torch.bool)
    nearest = torch.full_like(x, 1e9)
    for (ax, ay), (bx, by) in zip(corners, corners[1:] + corners[:1], strict=True):
        ex, ey = bx - ax, by - ay
        t = (((x - ax) * ex + (y - ay) * ey) / (ex * ex + ey * ey)).clamp(0, 1)
        nearest = nearest.minimum(torch.hypot(x - ax - t * ex, y - ay - t * ey))
        crosses = (ay > y) != (by > y)
        if ey:
            inside ^= crosses & (x < ex * (y - ay) / ey + ax)
    return torch.where(inside, -nearest, nearest)


def _around(radii: list[float], start: float = -math.pi / 2) -> list[tuple[float, float]]:
    step = 2 * math.pi / len(radii)
    return [
        (r * math.cos(start + i * step), r * math.sin(start + i * step))
        for i, r in enumerate(radii)
    ]


def _heart(x: Tensor, y: Tensor) -> Tensor:
    turns = [2 * math.pi * i / 48 for i in range(48)]
    outline = [
        (
            0.06 * 16 * math.sin(t) ** 3,
            -0.06
            * (13 * math.cos(t) - 5 * math.cos(2 * t) - 2 * math.cos(3 * t) - math.cos(4 * t)),
        )
        for t in turns
    ]
    return _polygon(x, y - 0.12, outline)


_FIELDS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "circle": lambda x, y: torch.hypot(x, y) - 0.95,
    "square": lambda x, y: _box(x, y, 0.8, 0.8),
    "triangle": lambda x, y: _polygon(x, y - 0.15, _around([1.1] * 3)),
    "diamond": lambda x, y: _polygon(x, y, [(0, -1.0), (0.72, 0), (0, 1.0), (-0.72, 0)]),
    "star": lambda x, y: _polygon(x, y, _around([1.05, 0.42] * 5)),
    "cross": lambda x, y: torch.minimum(_box(x, y, 0.95, 0.3), _box(x, y, 0.3, 0.95)),
    "ring": lambda x, y: (torch.hypot(x, y) - 0.72).abs() - 0.24,
    "heart": _heart,
}
