"""Stock models of real size with random weights, built where they run, and prompts for them.

Time does not depend on the weights at a fixed number of rows. Letters: B prompts, N visual tokens
of an image, S entries of a prompt.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

PAD = 0


@dataclass(frozen=True)
class Size:
    """A LLaVA and its prompt: text, one image, text.

    Attributes:
        name: in the rows.
        crops: crops of an image, the whole one included; 1: LLaVA-1.5, 5: LLaVA-NeXT.
        batches: numbers of prompts to measure.
        skips: numbers of decoder layers that visual rows skip.
        keeps: shares of tokens that token dropping leaves.
        width: hidden size of the language model.
        ffn: that of its feed-forward network.
        layers: its depth.
        heads: its heads.
        vocabulary: its tokens; the placeholder is the 64th from the end.
        tower: hidden size, feed-forward size, blocks, heads of the vision tower.
        pixels: side of a crop.
        patch: side of a patch.
        text: tokens before and behind the image.
    """

    name: str
    crops: int
    batches: tuple[int, ...] = (1,)
    skips: tuple[int, ...] = (0, 4, 8, 12, 16, 19, 24, 28)
    # the fractions of the testbed's sweeps, and one between the first of them and all
    keeps: tuple[float, ...] = (0.75, 0.5, 0.33, 0.22, 0.11, 0.055)
    width: int = 4096
    ffn: int = 11008
    layers: int = 32
    heads: int = 32
    vocabulary: int = 32064
    tower: tuple[int, int, int, int] = (1024, 4096, 24, 16)
    pixels: int = 336
    patch: int = 14
    # 35 is the length of LLaVA-1.5's system prompt with "USER: "
    text: tuple[int, int] = (35, 29)

    @property
    def image_token(self) -> int:
        """The placeholder."""
        return self.vocabulary - 64

    @property
    def side(self) -> int:
        """Visual tokens along a side of a crop."""
        return self.pixels // self.patch

    @property
    def visual(self) -> int:
        """N: visual tokens of the image, without newline tokens."""
        return self.crops * self.side**2

    @property
    def newlines(self) -> int:
        """Newline tokens of the image: one behind each row of its 2×2 crops."""
        return 2 * self.side if self.crops > 1 else 0

    @property
    def entries(self) -> int:
        """S."""
        return sum(self.text) + self.visual + self.newlines

    def places(self) -> tuple[Tensor, list[tuple[int, int, int]]]:
        """Columns of the visual tokens, `int64[N]`; of newline tokens the column and the range of
        visual tokens that are its row."""
        start, base, row = self.text[0], self.side**2, 2 * self.side
        columns, ends = list(range(start, start + base)), []
        for i in range(self.newlines):
            first = start + base + i * (row + 1)
            columns += range(first, first + row)
            ends.append((first + row, base + i * row, base + (i + 1) * row))
        return torch.tensor(columns), ends

    def inputs(self, batch: int, like: Tensor, seed: int = 0) -> dict[str, Tensor]:
        """Keyword inputs of B random prompts, on the device and with the dtype of `like`."""
        generator = torch.Generator().manual_seed(seed)
        before, behind = (
            torch.randint(3, self.image_token, (batch, n), generator=generator) for n in self.text
        )
        image = torch.full((batch, self.visual + self.newlines), self.image_token)
        ids = torch.cat([before, image, behind], 1)
        shape: tuple[int, ...] = (3, self.pixels, self.pixels)
        shape = (batch, *([self.crops] if self.crops > 1 else []), *shape)
        out = {
            "input_ids": ids,
            "attention_mask": torch.ones_like(ids),
            "pixel_values": torch.randn(shape, generator=generator).to(like.dtype),
        }
        if self.crops > 1:
            out["image_sizes"] = torch.full((batch, 2), 2 * self.pixels)
        return {name: x.to(like.device) for name, x in out.items()}


SIZES = {
    "llava-1.5-7b": Size("llava-1.5-7b", 1, batches=(1, 8)),
    "llava-next-7b": Size("llava-next-7b", 5),
}


def fewer(size: Size) -> Size:
    """Fewer points, for several prompts at once: a call takes several times as long."""
    return replace(size, skips=(0, 8, 16, 24, 28), keeps=(0.5, 0.22, 0.11))


def tiny(size: Size) -> Size:
    """The same on a scale for a CPU."""
    return replace(
        size,
        name=size.name.replace("7b", "tiny"),
        batches=size.batches[:1] if size.crops > 1 else (1, 2),
        skips=(0, 2),
        keeps=(0.75, 0.22),
        width=64,
        ffn=160,
        layers=6,
        heads=4,
        vocabulary=192,
        tower=(64, 96, 6, 2),
        pixels=24,
        patch=4 if size.crops == 1 else 8,
        text=(5, 4),
    )


def build(size: Size, device: str, dtype: torch.dtype, layers: int | None = None) -> Any:
    """The stock model, in eval mode, with sdpa; `layers` decoder layers instead of all."""
    from transformers import (
        AutoModelForImageTextToText,
        CLIPVisionConfig,
        LlamaConfig,
        LlavaConfig,
        LlavaNextConfig,
    )

    hidden, ffn, blocks, heads = size.tower
    given: dict[str, Any] = {
        "vision_config": CLIPVisionConfig(
            hidden_size=hidden,
            intermediate_size=ffn,
            num_hidden_layers=blocks,
            num_attention_heads=heads,
            image_size=size.pixels,
            patch_size=size.patch,
        ),
        "text_config": LlamaConfig(
            vocab_size=size.vocabulary,
            hidden_size=size.width,
            intermediate_size=size.ffn,
            num_hidden_layers=layers or size.layers,
            num_attention_heads=size.heads,
            num_key_value_heads=size.heads,
            max_position_embeddings=4096,
            pad_token_id=PAD,
        ),
        "image_token_id": size.image_token,
        "vision_feature_layer": -2,
        "vision_feature_select_strategy": "default",
    }
    if size.crops > 1:
        given["image_grid_pinpoints"] = [[2 * size.pixels, 2 * size.pixels]]
    config = (LlavaNextConfig if size.crops > 1 else LlavaConfig)(**given)
    torch.manual_seed(0)
    with torch.device(device):
        model = AutoModelForImageTextToText.from_config(
            config, dtype=dtype, attn_implementation="sdpa"
        )
    model.generation_config.pad_token_id = PAD
    model.generation_config.eos_token_id = None
    return model.eval()
