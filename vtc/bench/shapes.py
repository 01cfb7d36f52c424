"""Stock models of real size with random weights, built where they run, and prompts for them.

Time does not depend on the weights at a fixed number of tokens. What a method decides by itself
does: see `sharpen`. Letters: B prompts, I images of a prompt, N visual tokens of an image, S
entries of a prompt.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

PAD = 0

Inputs = dict[str, Tensor]


@dataclass(frozen=True)
class Tower:
    """A vision transformer.

    Attributes:
        width: D.
        ffn: hidden size of the feed-forward network.
        blocks: how many.
        heads: of attention.
        matrices: of the feed-forward network: 2, or 3 with a gate.
    """

    width: int
    ffn: int
    blocks: int
    heads: int
    matrices: int = 2


@dataclass(frozen=True)
class Decoder:
    """A language model of the Llama kind.

    Attributes:
        width: D.
        ffn: hidden size of the feed-forward network.
        layers: how many.
        heads: of queries.
        kv_heads: of keys and values.
        vocabulary: tokens; the placeholder of an image is the 64th from the end.
    """

    width: int
    ffn: int
    layers: int
    heads: int
    kv_heads: int
    vocabulary: int

    def config(self, layers: int | None = None) -> dict[str, Any]:
        """What all text configs have in common; `layers` instead of all."""
        return {
            "vocab_size": self.vocabulary,
            "hidden_size": self.width,
            "intermediate_size": self.ffn,
            "num_hidden_layers": layers or self.layers,
            "num_attention_heads": self.heads,
            "num_key_value_heads": self.kv_heads,
            # a benchmark of scale goes far beyond what the weights would be trained for
            "max_position_embeddings": 2**17,
            "pad_token_id": PAD,
            "bos_token_id": None,
            "eos_token_id": None,
        }


@dataclass(frozen=True)
class Shape(ABC):
    """A model and its prompt: text, images, text.

    Attributes:
        name: in the rows.
        tower: vision transformer.
        decoder: language model.
        text: tokens before and behind the images. 35 is the length of LLaVA-1.5's system prompt
            with "USER: ".
    """

    name: str
    tower: Tower
    decoder: Decoder
    text: tuple[int, int] = (35, 29)

    @property
    def image_token(self) -> int:
        """The placeholder."""
        return self.decoder.vocabulary - 64

    @property
    @abstractmethod
    def visual(self) -> int:
        """N, without newline tokens."""

    @property
    @abstractmethod
    def patches(self) -> tuple[int, int]:
        """Rows of the tower that an image takes, and the patches of each ([CLS] included)."""

    @property
    def newlines(self) -> int:
        """Newline tokens of an image."""
        return 0

    @property
    def borders(self) -> tuple[int, ...]:
        """Ids around the placeholders of an image."""
        return ()

    @property
    def windows(self) -> tuple[int, ...]:
        """Of each block, the patches that a patch attends to."""
        return (self.patches[1],) * self.tower.blocks

    @property
    @abstractmethod
    def connector(self) -> int:
        """Weights between tower and language model; each visual token meets all of them."""

    def entries(self, images: int = 1) -> int:
        """S."""
        return sum(self.text) + images * (self.visual + self.newlines + len(self.borders))

    @abstractmethod
    def config(self, layers: int | None = None) -> Any:
        """Of transformers; `layers` decoder layers instead of all."""

    @abstractmethod
    def pixels(self, images: int, generator: torch.Generator) -> Inputs:
        """Random pixel inputs of so many images."""

    def inputs(self, batch: int, like: Tensor, images: int = 1, seed: int = 0) -> Inputs:
        """Keyword inputs of B random prompts of I images each, on the device and with the dtype of
        `like`."""
        # where they are needed: 64 images take a second on a CPU
        device = like.device
        generator = torch.Generator(device).manual_seed(seed)
        before, behind = (
            torch.randint(3, self.image_token, (batch, n), generator=generator, device=device)
            for n in self.text
        )
        half, image = len(self.borders) // 2, [self.image_token] * (self.visual + self.newlines)
        one = [*self.borders[:half], *image, *self.borders[half:]]
        ids = torch.cat(
            [before, torch.tensor(one * images, device=device).expand(batch, -1), behind], 1
        )
        out = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        out |= self.pixels(batch * images, generator)
        return {
            name: x.to(like.device, like.dtype if x.is_floating_point() else None)
            for name, x in out.items()
        }


def build(
    shape: Shape,
    device: str,
    dtype: torch.dtype,
    layers: int | None = None,
    attention: str = "sdpa",
) -> Any:
    """The stock model in eval mode; `layers` decoder layers instead of all."""
    from transformers import AutoModelForImageTextToText

    torch.manual_seed(0)
    with torch.device(device):
        model = AutoModelForImageTextToText.from_config(
            shape.config(layers), dtype=dtype, attn_implementation=attention
        )
    model.generation_config.pad_token_id = PAD
    model.generation_config.eos_token_id = None
    return model.eval()


@torch.no_grad()
def sharpen(model: Any, spread: float = 2.5) -> None:
    """Let the tower of random weights look somewhere, as a trained one does.

    Random queries attend evenly, so that a method that goes by the entropy of attention (FlowCut)
    would drop nothing before its last cut. Random query biases, the same for all patches, give the
    logits of [CLS] and of the mean query this standard deviation in each head: the entropy of a
    CLIP's [CLS] row is 0.84 to 0.93 of log N then, by block. In the trained towers of the testbed
    it is 0.75 to 0.89.
    """
    from vtc.adapters.registry import adapter_of

    torch.manual_seed(1)
    for attention in adapter_of(model).encoder().attentions:
        named: dict[str, Tensor] = dict(attention.named_parameters())
        if (query := named.get("q_proj.bias")) is not None:
            key = named["k_proj.weight"]
        elif (query := named.get("qkv.bias")) is not None:
            query, key = query.chunk(3)[0], named["qkv.weight"].chunk(3)[1]
        else:
            continue
        # behind a norm, inputs have a variance of 1, and a key that of its row of weights
        query.copy_(torch.randn_like(query) * spread / key.float().norm(dim=1).clamp_min(1e-6))
