"""Prompts for the tiny models: what the real processors would return for random pictures."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from types import SimpleNamespace
from typing import Any, Literal

import torch
from torch import Tensor

from .models import (
    ASPECT,
    CROP,
    END,
    FRAMES_PER_PATCH,
    IMAGE,
    MERGE,
    PAD,
    PATCH,
    PINPOINTS,
    QWEN,
    START,
    VIDEO,
    WITH_VIDEO,
)

# an int is so many tokens of text; sizes are pixels, rounded to what the family can show
Part = int | str | tuple[str, int, int] | tuple[str, int, int, int]
Kind = Literal["image", "video"]
Inputs = dict[str, Tensor]

TOKEN: dict[Kind, int] = {"image": IMAGE, "video": VIDEO}
DEFAULT: dict[str, Part] = {"image": ("image", 24, 48), "video": ("video", 4, 16, 24)}

PROMPTS: dict[str, list[list[Part]]] = {
    "batch 1": [[4, "image", 5]],
    "image first": [["image", 5], [6, ("image", 40, 24), 1]],
    "ragged": [[4, ("image", 48, 48), 5], [2, ("image", 24, 24), 9]],
    "two images in one prompt": [[4, "image", 2, ("image", 32, 32), 5]],
    "adjacent images": [[3, ("image", 24, 24), "image", 4]],
    "mixed: two images, one image, text only": [
        [4, ("image", 24, 24), 2, "image", 5],
        [2, ("image", 40, 48), 9],
        [7],
    ],
}
VIDEO_PROMPTS: dict[str, list[list[Part]]] = {
    "video": [[3, "video", 4]],
    "image and video, video, text only": [
        [3, ("image", 32, 24), 2, "video", 4],
        [2, ("video", 4, 32, 16), 6],
        [5],
    ],
    "video and image, image": [[2, "video", 1, "image", 5], [4, ("image", 40, 24), 3]],
}


def prompts(family: str) -> dict[str, list[list[Part]]]:
    """Rows by name; those with videos only where `family` reads videos."""
    return PROMPTS | (VIDEO_PROMPTS if family in WITH_VIDEO else {})


def tokens_per_crop(family: str) -> int:
    """Visual tokens of one crop, tile or fixed-size image."""
    side = CROP[family] // PATCH // (MERGE if family == "internvl" else 1)
    return side * side


def tokens_per_frame(family: str) -> int:
    """Visual tokens of one video frame of fixed size."""
    side = CROP[family] // PATCH
    return (-(-side // 2)) ** 2 if family == "llava_onevision" else tokens_per_crop(family)


@cache
def _counter(family: str) -> Any:
    """The stock processor as far as it counts placeholders."""
    from transformers import LlavaNextProcessor, LlavaOnevisionProcessor

    kind = LlavaNextProcessor if family == "llava_next" else LlavaOnevisionProcessor
    counter = object.__new__(kind)
    counter.image_processor = SimpleNamespace(image_grid_pinpoints=PINPOINTS[family])
    counter.patch_size = PATCH
    counter.num_additional_image_tokens = 0
    counter.num_image_tokens = tokens_per_crop(family)
    counter.vision_aspect_ratio = ASPECT
    return counter


def anyres_count(family: str, size: Sequence[int], cut: bool = True) -> int:
    """Placeholders of an image of this size, newline tokens included; `cut`: into crops."""
    if not cut:
        return tokens_per_crop(family) + 1
    return _counter(family)._get_number_of_features(*size, CROP[family], CROP[family])


def anyres_crops(family: str, size: Sequence[int], cut: bool = True) -> int:
    """Crops of an image of this size, the whole one included."""
    from transformers.models.llava_next.modeling_llava_next import image_size_to_num_patches

    size = list(size)
    return image_size_to_num_patches(size, PINPOINTS[family], CROP[family]) if cut else 1


@dataclass
class _Visual:
    kind: Kind
    ids: list[int]
    pixels: Tensor
    size: tuple[int, ...] = ()


class _Writer:
    def __init__(self, family: str, seed: int) -> None:
        self.family = family
        self.generator = torch.Generator().manual_seed(seed)

    def text(self, n: int) -> list[int]:
        return torch.randint(3, 80, (n,), generator=self.generator).tolist()

    def pixels(self, *shape: int) -> Tensor:
        return torch.randn(shape, generator=self.generator)

    def crops(self, n: int) -> Tensor:
        return self.pixels(n, 3, CROP[self.family], CROP[self.family])

    def image(self, h: int, w: int, alone: bool) -> _Visual:
        if self.family in QWEN:
            return self._qwen("image", 1, h, w)
        if self.family == "internvl":
            grid = [max(1, round(side / CROP["internvl"])) for side in (h, w)]
            tiles = grid[0] * grid[1]
            tiles += tiles > 1  # the thumbnail
            ids = [START, *[IMAGE] * (tiles * tokens_per_crop("internvl")), END]
            return _Visual("image", ids, self.crops(tiles))
        if self.family in PINPOINTS:
            cut = alone or self.family == "llava_next"
            ids = [IMAGE] * anyres_count(self.family, (h, w), cut)
            pixels = self.crops(anyres_crops(self.family, (h, w), cut))
            return _Visual("image", ids, pixels, (h, w))
        return _Visual("image", [IMAGE] * tokens_per_crop(self.family), self.crops(1))

    def video(self, frames: int, h: int, w: int) -> _Visual:
        if self.family in QWEN:
            return self._qwen("video", frames // FRAMES_PER_PATCH, h, w)
        n = tokens_per_frame(self.family)
        if self.family == "internvl":
            frame = [START, *[IMAGE] * n, END]
            ids = [token for _ in range(frames) for token in (*self.text(2), *frame)]
            return _Visual("image", ids, self.crops(frames))
        return _Visual("video", [VIDEO] * (frames * n + 1), self.crops(frames))

    def _qwen(self, kind: Kind, t: int, h: int, w: int) -> _Visual:
        h, w = (max(1, round(side / PATCH / MERGE)) * MERGE for side in (h, w))
        n = h * w // MERGE**2
        if kind == "video" and self.family == "qwen3_vl":
            frame = [START, *[VIDEO] * n, END]
            ids = [token for _ in range(t) for token in (*self.text(3), *frame)]
        else:
            ids = [START, *[TOKEN[kind]] * (t * n), END]
        channels = 3 * FRAMES_PER_PATCH * PATCH * PATCH
        return _Visual(kind, ids, self.pixels(t * h * w, channels), (t, h, w))


def build_inputs(family: str, rows: Sequence[Sequence[Part]], seed: int = 0) -> Inputs:
    """Left-padded inputs; several images in one row of OneVision are not cut into crops."""
    writer = _Writer(family, seed)
    ids: list[list[int]] = []
    visuals: list[_Visual] = []
    images: list[int] = []
    for row in rows:
        parts = [DEFAULT.get(part, part) if isinstance(part, str) else part for part in row]
        images.append(sum(isinstance(part, tuple) and part[0] == "image" for part in parts))
        ids.append([])
        for part in parts:
            if isinstance(part, int):
                ids[-1] += writer.text(part)
                continue
            kind, *size = part
            made = writer.image(*size, images[-1] == 1) if kind == "image" else writer.video(*size)
            visuals.append(made)
            ids[-1] += made.ids
    width = max(map(len, ids))
    out = {
        "input_ids": torch.tensor([[PAD] * (width - len(i)) + i for i in ids]),
        "attention_mask": torch.tensor([[0] * (width - len(i)) + [1] * len(i) for i in ids]),
    }
    out |= _pixel_inputs(family, visuals)
    if family == "llava_onevision" and any(images):
        out["batch_num_images"] = torch.tensor([n for n in images if n])
    return out | _token_types(family, out["input_ids"])


def _token_types(family: str, ids: Tensor) -> Inputs:
    if family not in QWEN:
        return {}
    return {"mm_token_type_ids": ((ids == IMAGE) + 2 * (ids == VIDEO)).int()}


def _stack(crops: Sequence[Tensor]) -> Tensor:
    """Crops of several images in one tensor, zeros where an image has fewer."""
    out = crops[0].new_zeros(len(crops), max(map(len, crops)), *crops[0].shape[1:])
    for image, own in zip(out, crops, strict=True):
        image[: len(own)] = own
    return out


def _pixel_inputs(family: str, visuals: Sequence[_Visual]) -> Inputs:
    out: Inputs = {}
    kinds: tuple[Kind, Kind] = ("image", "video")
    for kind in kinds:
        some = [v for v in visuals if v.kind == kind]
        if not some:
            continue
        pixels, sizes = [v.pixels for v in some], torch.tensor([v.size for v in some])
        name = "pixel_values" if kind == "image" else "pixel_values_videos"
        out[name] = _stack(pixels) if family in PINPOINTS else torch.cat(pixels)
        if family in QWEN:
            out[f"{kind}_grid_thw"] = sizes
            if kind == "video" and family == "qwen2_5_vl":
                out["second_per_grid_ts"] = torch.arange(2, len(some) + 2).float()
        elif kind == "image" and family in PINPOINTS:
            out["image_sizes"] = sizes
    return out


def cut_into_crops(inputs: Inputs) -> list[bool]:
    """Of each image: whether it is cut into crops."""
    numbers = inputs.get("batch_num_images", torch.ones(len(inputs["image_sizes"]))).tolist()
    return [n == 1 for n in numbers for _ in range(int(n))]


def counts(family: str, inputs: Inputs, kind: Kind) -> list[int]:
    """Placeholders of each image or video, newline tokens included."""
    name = "pixel_values" if kind == "image" else "pixel_values_videos"
    if name not in inputs:
        return []
    if family in QWEN:
        return (inputs[f"{kind}_grid_thw"].prod(-1) // MERGE**2).tolist()
    if kind == "video":
        return [len(video) * tokens_per_frame(family) + 1 for video in inputs[name]]
    if family == "internvl":
        ids = inputs["input_ids"].flatten()
        begins, ends = (ids == START).nonzero(), (ids == END).nonzero()
        return (ends - begins - 1).flatten().tolist()
    if family in PINPOINTS:
        sizes = zip(inputs["image_sizes"].tolist(), cut_into_crops(inputs), strict=True)
        return [anyres_count(family, size, cut) for size, cut in sizes]
    return [tokens_per_crop(family)] * len(inputs[name])


def placeholders(family: str, inputs: Inputs, kind: Kind) -> list[Tensor]:
    """(row, column) of the placeholders of each image or video, `int64[P, 2]`."""
    places = (inputs["input_ids"] == TOKEN[kind]).nonzero()
    return list(places.split(counts(family, inputs, kind)))


def take_rows(family: str, inputs: Inputs, rows: Sequence[int]) -> Inputs:
    """The pixels, grids and sizes of these batch rows, in this order; a row may repeat."""
    out: Inputs = {}
    kinds: tuple[Kind, Kind] = ("image", "video")
    for kind in kinds:
        owner = [int(place[0, 0]) for place in placeholders(family, inputs, kind)]
        chosen = [g for row in rows for g, own in enumerate(owner) if own == row]
        if not chosen:
            continue
        name = "pixel_values" if kind == "image" else "pixel_values_videos"
        lengths = [1] * len(owner)
        if family in QWEN:
            lengths = inputs[f"{kind}_grid_thw"].prod(-1).tolist()
        elif family == "internvl":
            lengths = [n // tokens_per_crop(family) for n in counts(family, inputs, kind)]
        pixels = inputs[name].split(lengths)
        out[name] = torch.cat([pixels[g] for g in chosen])
        of_kind = {"image": ("image_sizes", "image_grid_thw"), "video": ("video_grid_thw",)}
        more = ("second_per_grid_ts",) if kind == "video" else ()
        out |= {k: inputs[k][chosen] for k in (*of_kind[kind], *more) if k in inputs}
        if kind == "image" and "batch_num_images" in inputs:
            numbers = [owner.count(row) for row in rows]
            out["batch_num_images"] = torch.tensor([n for n in numbers if n])
        if "image_sizes" in out and kind == "image":
            sizes = zip(out["image_sizes"].tolist(), cut_into_crops(out), strict=True)
            out[name] = out[name][:, : max(anyres_crops(family, *size) for size in sizes)]
    return out


def alone(family: str, inputs: Inputs, row: int) -> Inputs:
    """One batch row by itself, without its padding and with only its own pixels."""
    kept = inputs["attention_mask"][row].bool()
    names = ("input_ids", "attention_mask", "mm_token_type_ids")
    out = {name: inputs[name][row : row + 1, kept] for name in names if name in inputs}
    return out | take_rows(family, inputs, [row])
