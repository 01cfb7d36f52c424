"""LLaVA-1.5: one image, one square grid of patches; CLIP (with [CLS]) or SigLIP tower."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from vtc.adapters.base import Adapter, Encoder, Grid
from vtc.errors import InputError, UnsupportedModeError, UnsupportedModelError

_TOWERS_WITH_CLS = {"clip_vision_model": True, "siglip_vision_model": False}


class LlavaAdapter(Adapter):
    """`LlavaForConditionalGeneration`."""

    model_types: ClassVar[tuple[str, ...]] = ("llava",)
    supported: ClassVar[str] = "LlavaForConditionalGeneration (LLaVA-1.5)"
    visual_inputs: ClassVar[tuple[str, ...]] = ("pixel_values", "image_sizes")
    feature_options: ClassVar[tuple[str, ...]] = (
        "vision_feature_layer",
        "vision_feature_select_strategy",
    )

    def check(self) -> None:
        """Refuse towers and feature layers for which tokens are not the patches of one grid."""
        config = self.model.config
        tower = config.vision_config.model_type
        if tower not in _TOWERS_WITH_CLS:
            raise UnsupportedModelError(
                f"this LLaVA has a vision tower of type {tower!r}; expected one of "
                f"{sorted(_TOWERS_WITH_CLS)}"
            )
        wanted = "default" if _TOWERS_WITH_CLS[tower] else "full"
        got = config.vision_feature_select_strategy
        if got != wanted:
            raise UnsupportedModelError(
                f"vision_feature_select_strategy={got!r} with a {tower} tower gives tokens that "
                f"are not its patches; expected {wanted!r}: set "
                "model.config.vision_feature_select_strategy"
            )

    @property
    def tower(self) -> nn.Module:
        """CLIP or SigLIP."""
        return self.model.model.vision_tower  # type: ignore[no-any-return]

    def encoder(self) -> Encoder:
        """Blocks of the tower; the tap is the deepest block among `vision_feature_layer`."""
        config = self.model.config
        tower: Any = getattr(self.tower, "vision_model", self.tower)
        blocks = tower.encoder.layers
        layers = config.vision_feature_layer
        # hidden_states has one entry more than there are blocks: the embeddings come first
        entries = [
            i % (len(blocks) + 1)
            for i in (layers if isinstance(layers, list | tuple) else [layers])
        ]
        return Encoder(
            attentions=tuple(block.self_attn for block in blocks),
            tap=max(entries) - 1,
            has_cls=_TOWERS_WITH_CLS[config.vision_config.model_type],
        )

    @property
    def image_token_id(self) -> int:
        """`<image>`."""
        return int(self.model.config.image_token_id)

    def has_images(self, inputs: Mapping[str, Any]) -> bool:
        """Whether `pixel_values` is given."""
        return inputs.get("pixel_values") is not None

    def _patch(self) -> int:
        return int(self.model.config.vision_config.patch_size)

    def grids(self, inputs: Mapping[str, Any]) -> list[Grid]:
        """All images of a call have one size."""
        pixels, channels = inputs["pixel_values"], self.model.config.vision_config.num_channels
        if not isinstance(pixels, Tensor) or pixels.dim() != 4 or pixels.shape[1] != channels:
            got = tuple(pixels.shape) if isinstance(pixels, Tensor) else type(pixels).__name__
            raise InputError(
                f"pixel_values is {got}, expected a tensor [images, {channels}, height, width]"
            )
        images, _, height, width = pixels.shape
        return [(1, height // self._patch(), width // self._patch())] * images

    def pixels(self, inputs: Mapping[str, Any]) -> list[Tensor]:
        """One `[3, H, W]` per image."""
        return list(inputs["pixel_values"])

    def encode_resized(
        self, inputs: Mapping[str, Any], sizes: list[tuple[int, int]]
    ) -> list[Tensor]:
        """Antialiased bicubic resize of the normalized pixels, then the stock tower with
        interpolated positions."""
        if any(weight.is_meta for weight in self.tower.parameters()):
            raise UnsupportedModeError(
                "the vision tower's weights are offloaded, expected them on a device: stock "
                "interpolation of position embeddings reads them as they are"
            )
        found: list[Tensor] = [torch.empty(0)] * len(sizes)
        for h, w in dict.fromkeys(sizes):
            members = [i for i, size in enumerate(sizes) if size == (h, w)]
            pixels = inputs["pixel_values"][members]
            small = F.interpolate(
                pixels.float(),
                size=(h * self._patch(), w * self._patch()),
                mode="bicubic",
                antialias=True,
                align_corners=False,
            ).to(pixels.dtype)
            output = self.model.model.get_image_features(
                pixel_values=small, interpolate_pos_encoding=True, return_dict=True
            )
            for i, tokens in zip(members, output.pooler_output, strict=True):
                found[i] = tokens
        return found
