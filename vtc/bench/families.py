"""The shapes that are measured: LLaVA-1.5, LLaVA-NeXT, Qwen2.5-VL and InternVL3."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch

from vtc.bench.shapes import Decoder, Inputs, Shape, Tower


@dataclass(frozen=True)
class Llava(Shape):
    """LLaVA-1.5 (one crop) or LLaVA-NeXT (an image and its 2×2 crops).

    Attributes:
        crops: of an image, the whole one included: 1 or 5.
        side: of a crop, in pixels.
        patch: side of a patch.
    """

    crops: int = 1
    side: int = 336
    patch: int = 14

    @property
    def cells(self) -> int:
        """Visual tokens along a side of a crop."""
        return self.side // self.patch

    @property
    def visual(self) -> int:
        """Of all crops."""
        return self.crops * self.cells**2

    @property
    def connector(self) -> int:
        """Two linears."""
        return (self.tower.width + self.decoder.width) * self.decoder.width

    @property
    def newlines(self) -> int:
        """One behind each row of the 2×2 crops."""
        return 2 * self.cells if self.crops > 1 else 0

    @property
    def patches(self) -> tuple[int, int]:
        """Crops, and the patches of one with its [CLS]."""
        return self.crops, self.cells**2 + 1

    def config(self, layers: int | None = None) -> Any:
        """With a CLIP tower and a Llama."""
        from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaNextConfig

        given: dict[str, Any] = {
            "vision_config": CLIPVisionConfig(
                hidden_size=self.tower.width,
                intermediate_size=self.tower.ffn,
                num_hidden_layers=self.tower.blocks,
                num_attention_heads=self.tower.heads,
                image_size=self.side,
                patch_size=self.patch,
            ),
            "text_config": LlamaConfig(**self.decoder.config(layers)),
            "image_token_id": self.image_token,
            "vision_feature_layer": -2,
            "vision_feature_select_strategy": "default",
        }
        if self.crops > 1:
            given["image_grid_pinpoints"] = [[2 * self.side, 2 * self.side]]
        return (LlavaNextConfig if self.crops > 1 else LlavaConfig)(**given)

    def pixels(self, images: int, generator: torch.Generator) -> Inputs:
        """Crops; of LLaVA-NeXT with the size of the image."""
        crops = [self.crops] if self.crops > 1 else []
        shape = (images, *crops, 3, self.side, self.side)
        out = {"pixel_values": torch.randn(shape, generator=generator, device=generator.device)}
        if self.crops > 1:
            out["image_sizes"] = torch.full((images, 2), 2 * self.side)
        return out


@dataclass(frozen=True)
class Qwen25(Shape):
    """Qwen2.5-VL and a square image: most blocks attend within windows.

    Attributes:
        side: of the image, in pixels.
        patch: side of a patch; 2×2 become one token.
        window: side of a window, in pixels.
        whole: blocks that attend to the whole image.
    """

    side: int = 1008
    patch: int = 14
    window: int = 112
    whole: tuple[int, ...] = (7, 15, 23, 31)

    @property
    def visual(self) -> int:
        """A quarter of the patches."""
        return (self.side // self.patch // 2) ** 2

    @property
    def connector(self) -> int:
        """Two linears behind four patches side by side."""
        joined = 4 * self.tower.width
        return (joined + self.decoder.width) * joined

    @property
    def patches(self) -> tuple[int, int]:
        """One row of all patches."""
        return 1, (self.side // self.patch) ** 2

    @property
    def windows(self) -> tuple[int, ...]:
        """A window, or all."""
        window = (self.window // self.patch) ** 2
        all_of_it = self.patches[1]
        return tuple(all_of_it if b in self.whole else window for b in range(self.tower.blocks))

    @property
    def borders(self) -> tuple[int, ...]:
        """Where vision starts and ends."""
        return self.image_token + 2, self.image_token + 3

    def config(self, layers: int | None = None) -> Any:
        """With M-RoPE."""
        from transformers import Qwen2_5_VLConfig

        pairs = self.decoder.width // self.decoder.heads // 2
        sections = [pairs // 4, 3 * pairs // 8, pairs - pairs // 4 - 3 * pairs // 8]
        rope = {"rope_type": "default", "rope_theta": 1e6, "mrope_section": sections}
        return Qwen2_5_VLConfig(
            vision_config={
                "depth": self.tower.blocks,
                "hidden_size": self.tower.width,
                "intermediate_size": self.tower.ffn,
                "num_heads": self.tower.heads,
                "out_hidden_size": self.decoder.width,
                "patch_size": self.patch,
                "spatial_merge_size": 2,
                "temporal_patch_size": 2,
                "window_size": self.window,
                "fullatt_block_indexes": list(self.whole),
            },
            text_config={**self.decoder.config(layers), "rope_parameters": rope},
            image_token_id=self.image_token,
            video_token_id=self.image_token + 1,
            vision_start_token_id=self.borders[0],
            vision_end_token_id=self.borders[1],
        )

    def pixels(self, images: int, generator: torch.Generator) -> Inputs:
        """Patches of two frames each, and the grids."""
        side = self.side // self.patch
        values = 3 * 2 * self.patch**2
        return {
            "pixel_values": torch.randn(
                images * side * side, values, generator=generator, device=generator.device
            ),
            "image_grid_thw": torch.tensor([[1, side, side]] * images),
        }

    def inputs(self, *args: Any, **kwargs: Any) -> Inputs:
        """With the kinds of tokens, which M-RoPE goes by."""
        out = super().inputs(*args, **kwargs)
        return out | {"mm_token_type_ids": (out["input_ids"] == self.image_token).int()}


@dataclass(frozen=True)
class InternVL3(Shape):
    """InternVL3: an image of several tiles and its thumbnail, pixel shuffle.

    Attributes:
        tiles: of an image, the thumbnail included.
        side: of a tile, in pixels.
        patch: side of a patch; 2×2 become one token.
    """

    tiles: int = 13
    side: int = 448
    patch: int = 14

    @property
    def per_tile(self) -> int:
        """Tokens of a tile."""
        return (self.side // self.patch // 2) ** 2

    @property
    def visual(self) -> int:
        """Of all tiles."""
        return self.tiles * self.per_tile

    @property
    def connector(self) -> int:
        """Two linears behind four patches side by side."""
        return (4 * self.tower.width + self.decoder.width) * self.decoder.width

    @property
    def patches(self) -> tuple[int, int]:
        """Tiles, and the patches of one with its [CLS]."""
        return self.tiles, (self.side // self.patch) ** 2 + 1

    @property
    def borders(self) -> tuple[int, ...]:
        """Where an image starts and ends."""
        return self.image_token + 2, self.image_token + 3

    def config(self, layers: int | None = None) -> Any:
        """InternViT and a Qwen2."""
        from transformers import InternVLConfig, InternVLVisionConfig, Qwen2Config

        return InternVLConfig(
            vision_config=InternVLVisionConfig(
                hidden_size=self.tower.width,
                intermediate_size=self.tower.ffn,
                num_hidden_layers=self.tower.blocks,
                num_attention_heads=self.tower.heads,
                image_size=[self.side, self.side],
                patch_size=[self.patch, self.patch],
                attention_bias=True,
            ),
            text_config=Qwen2Config(**self.decoder.config(layers)),
            image_token_id=self.image_token,
            image_seq_length=self.per_tile,
            tie_word_embeddings=False,
        )

    def pixels(self, images: int, generator: torch.Generator) -> Inputs:
        """Tiles."""
        shape = (images * self.tiles, 3, self.side, self.side)
        return {"pixel_values": torch.randn(shape, generator=generator, device=generator.device)}


_CLIP = Tower(1024, 4096, 24, 16)
_LLAMA = Decoder(4096, 11008, 32, 32, 32, 32064)
_QWEN = Decoder(3584, 18944, 28, 28, 4, 152064)

SHAPES: dict[str, Shape] = {
    "llava-1.5-7b": Llava("llava-1.5-7b", _CLIP, _LLAMA),
    "llava-next-7b": Llava("llava-next-7b", _CLIP, _LLAMA, crops=5),
    "qwen2.5-vl-7b": Qwen25("qwen2.5-vl-7b", Tower(1280, 3420, 32, 16, 3), _QWEN),
    "internvl3-8b": InternVL3("internvl3-8b", _CLIP, Decoder(3584, 18944, 28, 28, 4, 151674)),
}


def tiny(shape: Shape) -> Shape:
    """The same on a scale for a CPU; its times say nothing."""
    name = shape.name.rsplit("-", 1)[0] + "-tiny"
    small: dict[str, Any] = {
        "name": name,
        "tower": Tower(64, 96, 6, 2, shape.tower.matrices),
        "decoder": Decoder(64, 160, 6, 4, min(4, shape.decoder.kv_heads), 192),
        "text": (5, 4),
    }
    if isinstance(shape, Llava):
        return replace(shape, **small, side=24, patch=4 if shape.crops == 1 else 8)
    if isinstance(shape, Qwen25):
        return replace(shape, **small, side=48, patch=4, window=16, whole=(2, 5))
    if isinstance(shape, InternVL3):
        return replace(shape, **small, tiles=3, side=24, patch=4)
    raise TypeError(f"{type(shape).__name__} has no small form")
