"""Tiny random stock models, prompts for them, and the oracle that a compressed model must equal."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import pytest
import torch
from hypothesis import settings

# a busy machine is not a failed property
settings.register_profile("no deadline", deadline=None)
settings.load_profile("no deadline")


def pytest_collection_finish() -> None:
    """What is there by now stays: looks for garbage need not go through all of torch again."""
    gc.collect()
    gc.freeze()


IMAGE, PAD, EOS = 90, 0, 1
GRID = 6  # 6×6 patches per image
N = GRID * GRID


def build_llava(*, blocks: int = 6, tower: str = "clip", seed: int = 0, **config: Any) -> Any:
    """A LLaVA with random weights, 4 decoder layers, in eval mode and fp32."""
    from transformers import (
        CLIPVisionConfig,
        LlamaConfig,
        LlavaConfig,
        LlavaForConditionalGeneration,
        SiglipVisionConfig,
    )

    torch.manual_seed(seed)
    vision: dict[str, Any] = {
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": blocks,
        "num_attention_heads": 2,
        "image_size": GRID * 4,
        "patch_size": 4,
    }
    text = LlamaConfig(
        vocab_size=100,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=4,
        num_attention_heads=2,
        num_key_value_heads=2,
        max_position_embeddings=2048,
        pad_token_id=PAD,
        bos_token_id=2,
        eos_token_id=EOS,
    )
    given = {
        "vision_feature_layer": -2,
        "vision_feature_select_strategy": "default",
        "image_token_id": IMAGE,
    }
    vision_config = CLIPVisionConfig(**vision) if tower == "clip" else SiglipVisionConfig(**vision)
    model = LlavaForConditionalGeneration(
        LlavaConfig(vision_config=vision_config, text_config=text, **(given | config))
    )
    # random initial weights attend almost evenly: sharpen them so that scores and answers differ
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if name.endswith(("q_proj.weight", "k_proj.weight")):
                weight.mul_(8)
    model.generation_config.pad_token_id = PAD
    model.generation_config.eos_token_id = None
    return model.eval()


def build_inputs(rows: Sequence[Sequence[int | None]], seed: int = 0) -> dict[str, torch.Tensor]:
    """Left-padded inputs: each row is a list of text lengths, with None for an image."""
    generator = torch.Generator().manual_seed(seed)
    ids = []
    for row in rows:
        parts = [
            torch.full((N,), IMAGE)
            if n is None
            else torch.randint(3, 80, (n,), generator=generator)
            for n in row
        ]
        ids.append(torch.cat(parts))
    width = max(map(len, ids))
    images = sum(part is None for row in rows for part in row)
    out = {
        "input_ids": torch.stack([torch.cat([torch.full((width - len(i),), PAD), i]) for i in ids]),
        "attention_mask": torch.stack(
            [torch.cat([torch.zeros(width - len(i)), torch.ones(len(i))]).long() for i in ids]
        ),
    }
    if images:
        out["pixel_values"] = torch.randn(images, 3, GRID * 4, GRID * 4, generator=generator)
    return out


def masked(inputs: dict[str, torch.Tensor], selection: Any) -> dict[str, torch.Tensor]:
    """The oracle's inputs: dropped tokens get `attention_mask = 0`, positions are the original
    ones."""
    ids, mask = inputs["input_ids"], inputs["attention_mask"].clone()
    positions = (mask.cumsum(-1) - 1).masked_fill(mask == 0, 0)
    places = (ids == IMAGE).nonzero().split(list(selection.lengths))
    for g, place in enumerate(places):
        dropped = place[~selection.mask()[g, : len(place)].cpu()]
        mask[dropped[:, 0], dropped[:, 1]] = 0
    return {**inputs, "attention_mask": mask, "position_ids": positions}


@contextmanager
def rows_expanded_by_hand(model: Any) -> Iterator[None]:
    """Within it a stock model repeats whole rows for beams: below transformers 5.18 it interleaves
    the images of a row (A, A, B, B for A, B, A, B)."""
    stock = model._expand_inputs_for_generation

    def expand(
        expand_size: int = 1, input_ids: Any = None, pixel_values: Any = None, **kwargs: Any
    ) -> Any:
        ids, out = stock(expand_size=expand_size, input_ids=input_ids, **kwargs)
        if pixel_values is not None:  # newer versions have encoded them by now
            images = ((input_ids == IMAGE).sum(-1) // N).tolist()
            of_row = pixel_values.split(images)
            out["pixel_values"] = torch.cat([p.repeat(expand_size, 1, 1, 1) for p in of_row])
        return ids, out

    model._expand_inputs_for_generation = expand
    try:
        yield
    finally:
        del model._expand_inputs_for_generation


def build_processor() -> Any:
    """A real LlavaProcessor whose ids are those of the tiny models."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import CLIPImageProcessor, LlavaProcessor, PreTrainedTokenizerFast

    words = {f"w{i}": i for i in range(100)} | {"<pad>": PAD, "<eos>": EOS, "<image>": IMAGE}
    tokenizer = Tokenizer(
        models.WordLevel({w: i for w, i in words.items() if w not in ("w0", "w1", "w90")}, "w3")
    )
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>", padding_side="left"
    )
    fast.add_special_tokens({"additional_special_tokens": ["<image>"]})
    size = {"height": GRID * 4, "width": GRID * 4}
    template = (
        "{% for m in messages %}{% for c in m.content %}"
        "{% if c.type == 'image' %}<image> {% else %}{{ c.text }} {% endif %}"
        "{% endfor %}{% endfor %}"
    )
    return LlavaProcessor(
        CLIPImageProcessor(size={"shortest_edge": GRID * 4}, crop_size=size),
        fast,
        patch_size=4,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=template,
        image_token="<image>",
    )


@pytest.fixture
def processor() -> Any:
    return build_processor()


@pytest.fixture
def llava() -> Any:
    return build_llava()


@pytest.fixture
def make_llava() -> Callable[..., Any]:
    return build_llava


@pytest.fixture
def make_inputs() -> Callable[..., dict[str, torch.Tensor]]:
    return build_inputs


@pytest.fixture
def expanded_by_hand() -> Callable[[Any], AbstractContextManager[None]]:
    return rows_expanded_by_hand


@pytest.fixture
def oracle() -> Callable[..., dict[str, torch.Tensor]]:
    return masked
