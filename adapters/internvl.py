"""InternVL: an image is one tile or several and a thumbnail; pixel shuffle makes one token of four
patches. A video is its frames, an image each."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from vtc.adapters.base import (
    Adapter,
    Encoder,
    Visual,
    by_size,
    check_on_device,
    check_pixels,
    resized,
)
from vtc.errors import InputError, UnsupportedModelError


class InternVLAdapter(Adapter):
    """`InternVLForConditionalGeneration`."""

    model_types: ClassVar[tuple[str, ...]] = ("internvl",)
    supported: ClassVar[str] = "InternVLForConditionalGeneration (InternVL)"
    visual_inputs: ClassVar[tuple[str, ...]] = ("pixel_values",)
    feature_options: ClassVar[tuple[str, ...]] = (
        "vision_feature_layer",
        "vision_feature_select_strategy",
    )
    tiled: ClassVar[bool] = True

    def check(self) -> None:
        """Refuse feature strategies for which tokens are not the patches of one grid."""
        config = self.model.config
        if (got := config.vision_feature_select_strategy) != "default":
            raise UnsupportedModelError(
                f"vision_feature_select_strategy={got!r} sends [CLS] through the pixel shuffle; "
                "expected 'default': set model.config.vision_feature_select_strategy"
            )
        if not isinstance(config.vision_feature_layer, int):
            raise UnsupportedModelError(
                f"vision_feature_layer={config.vision_feature_layer!r}, expected one layer"
            )
        if config.vision_config.model_type != "internvl_vision":
            raise UnsupportedModelError(
                f"this InternVL has a vision tower of type {config.vision_config.model_type!r}; "
                "expected 'internvl_vision'"
            )
        self._every: int = round(1 / config.downsample_ratio)
        self.patches_per_token = self._every**2

    @property
    def tower(self) -> nn.Module:
        """InternViT."""
        return self.model.model.vision_tower  # type: ignore[no-any-return]

    def encoder(self) -> Encoder:
        """Blocks of InternViT, whose last output is read."""
        blocks = self.model.model.vision_tower.encoder.layer
        entry = self.model.config.vision_feature_layer % (len(blocks) + 1)
        return Encoder(
            blocks=tuple(blocks),
            attentions=tuple(block.attention for block in blocks),
            tap=entry - 1,
            has_cls=True,
        )

    def _patch(self) -> int:
        size = self.model.config.vision_config.patch_size
        return int(size if isinstance(size, int) else size[0])

    def _side(self, pixels: Tensor) -> int:
        """Tokens on one side of a tile."""
        height, width = map(int, pixels.shape[-2:])
        if height != width:
            raise InputError(
                f"pixel_values is {tuple(pixels.shape)}, expected square tiles: pass the "
                "processor's output"
            )
        return height // self._patch() // self._every

    def visuals(self, inputs: Mapping[str, Any], runs: list[int]) -> list[Visual]:
        """Each stretch of placeholders is an image, of as many tiles as it is long."""
        pixels = check_pixels(
            inputs["pixel_values"], "pixel_values", 4, "[tiles, channels, height, width]"
        )
        side = self._side(pixels)
        tiles = [divmod(run, side * side) for run in runs]
        if any(rest for _, rest in tiles) or sum(n for n, _ in tiles) != len(pixels):
            raise InputError(
                f"input_ids hold stretches of {runs} image placeholders, expected multiples of "
                f"{side * side} that make {len(pixels)} tiles: pass the processor's output"
            )
        return [
            Visual(((1, side, side),) * n, rows=n, overview=n - 1 if n > 1 else None)
            for n, _ in tiles
        ]

    def pixels(self, inputs: Mapping[str, Any], visuals: list[Visual]) -> list[Tensor]:
        """The tiles `[R, 3, H, W]` of each image."""
        return list(inputs["pixel_values"].split([v.rows for v in visuals]))

    def units(self, patches: int) -> Tensor | None:
        """Found by shuffling the numbers of the patches."""
        side = round(patches**0.5)
        numbers = torch.arange(float(patches)).view(1, side, side, 1)
        shuffled = self.model.model.pixel_shuffle(numbers, self.model.config.downsample_ratio)
        return shuffled.reshape(-1, self.patches_per_token).long()  # type: ignore[no-any-return]

    def part(
        self, inputs: Mapping[str, Any], visuals: list[Visual], chosen: list[int]
    ) -> dict[str, Any]:
        """Tiles of the chosen images."""
        tiles = self.pixels(inputs, visuals)
        return {"pixel_values": torch.cat([tiles[i] for i in chosen])}

    def encode_resized(
        self, inputs: Mapping[str, Any], visuals: list[Visual], sizes: list[tuple[int, int]]
    ) -> list[Tensor]:
        """The thumbnail, or the only tile, resized; the stock tower interpolates its positions."""
        check_on_device(self.tower)
        side = self._patch() * self._every
        found: list[Tensor] = [torch.empty(0)] * len(sizes)
        tiles = self.pixels(inputs, visuals)
        for (h, w), members in by_size(sizes).items():
            pixels = torch.stack([tiles[i][-1] for i in members])
            small = resized(pixels, h * side, w * side)
            output = self.model.model.get_image_features(pixel_values=small, return_dict=True)
            for i, tokens in zip(members, output.pooler_output, strict=True):
                found[i] = tokens
        return found
