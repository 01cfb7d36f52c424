"""The testbed's InternVL: a tower with [CLS], pixel shuffle, Qwen2 behind it, clips as frames."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from vtc.testbed.families.text import ASSISTANT, END, PAD, START, build_tokenizer, corpus
from vtc.testbed.scenes import SIZE
from vtc.testbed.vocabulary import TEMPLATES

if TYPE_CHECKING:
    from transformers import InternVLForConditionalGeneration, InternVLProcessor

PATCH = 4
IMAGE_TOKENS = (SIZE // PATCH // 2) ** 2
IMAGE, VIDEO, IMAGE_START, IMAGE_END = "<IMG_CONTEXT>", "<video>", "<img>", "</img>"
BEFORE, AFTER = "\n", ASSISTANT

CHAT_TEMPLATE = """\
{%- for message in messages -%}
{{ '<|im_start|>' + message['role'] + '\\n' }}
{%- if message['content'] is string -%}
{{ message['content'] }}
{%- else -%}
{%- for part in message['content'] -%}
{%- if part['type'] == 'image' -%}{{ '<IMG_CONTEXT>\\n' }}
{%- elif part['type'] == 'video' -%}{{ '<video>\\n' }}
{%- elif part['type'] == 'text' -%}{{ part['text'] }}
{%- endif -%}
{%- endfor -%}
{%- endif -%}
{{ '<|im_end|>\\n' }}
{%- endfor -%}
{%- if add_generation_prompt -%}{{ '<|im_start|>assistant\\n' }}{%- endif -%}
"""


def tokenizer() -> Any:
    """The tokenizer, trained anew; always the same."""
    chat = ["user\n", "assistant\n", "\n", *[f"\nFrame{i}: " for i in range(10)] * 20]
    return build_tokenizer(
        corpus(TEMPLATES, BEFORE, "", chat),
        [PAD, START, END, IMAGE_START, IMAGE_END, IMAGE, VIDEO],
        pad_token=PAD,
        eos_token=END,
        extra_special_tokens={
            "im_start_token": START,
            "start_image_token": IMAGE_START,
            "end_image_token": IMAGE_END,
            "context_image_token": IMAGE,
            "video_token": VIDEO,
        },
    )


def build_processor() -> InternVLProcessor:
    """The stock processor: every picture is one tile of 112×112 pixels."""
    from transformers import GotOcr2ImageProcessor, InternVLProcessor, InternVLVideoProcessor

    pixels = {"height": SIZE, "width": SIZE}
    return InternVLProcessor(
        image_processor=GotOcr2ImageProcessor(size=pixels, max_patches=1),
        tokenizer=tokenizer(),
        video_processor=InternVLVideoProcessor(size=pixels),
        image_seq_length=IMAGE_TOKENS,
        chat_template=CHAT_TEMPLATE,
    )


def build_model(tokenizer: Any, small: bool = False) -> InternVLForConditionalGeneration:
    """The untrained model in the stock class; `small` is a toy of the same layout for tests."""
    from transformers import (
        InternVLConfig,
        InternVLForConditionalGeneration,
        InternVLVisionConfig,
        Qwen2Config,
    )

    blocks, width, layers, hidden = (2, 64, 2, 64) if small else (8, 128, 6, 256)
    vision = InternVLVisionConfig(
        image_size=SIZE,
        patch_size=PATCH,
        hidden_size=width,
        intermediate_size=4 * width,
        num_hidden_layers=blocks,
        num_attention_heads=width // 32,
        attention_bias=True,
        # 0.1 is for towers of 24 blocks that are trained for weeks
        layer_scale_init_value=1.0,
    )
    text = Qwen2Config(
        vocab_size=len(tokenizer),
        hidden_size=hidden,
        intermediate_size=hidden * 43 // 16,
        num_hidden_layers=layers,
        num_attention_heads=hidden // 32,
        num_key_value_heads=hidden // 64,
        max_position_embeddings=2048,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        tie_word_embeddings=False,
    )
    config = InternVLConfig(
        vision_config=vision,
        text_config=text,
        image_token_id=tokenizer.convert_tokens_to_ids(IMAGE),
        image_seq_length=IMAGE_TOKENS,
        tie_word_embeddings=False,
    )
    model = InternVLForConditionalGeneration(config)
    embeddings = model.model.vision_tower.embeddings
    # with the stock 0.02 the patches drown in what the first blocks add to all of them alike, and
    # from places of zero they do not tell where they are
    torch.nn.init.normal_(embeddings.patch_embeddings.projection.weight, std=0.12)
    torch.nn.init.normal_(embeddings.cls_token, std=0.5)
    with torch.no_grad():
        embeddings.position_embeddings[0, 1:] = 0.5 * _waves(SIZE // PATCH, width)
    return model


def _waves(side: int, width: int) -> Tensor:
    """Sines and cosines of row and column, [side · side, width]."""
    speed = math.pi * 0.5 ** (torch.arange(width // 4) * 16 / width)
    angle = torch.arange(side)[:, None] * speed
    axis = torch.cat([angle.sin(), angle.cos()], 1)
    rows, columns = axis[:, None].expand(-1, side, -1), axis[None].expand(side, -1, -1)
    return torch.cat([rows, columns], -1).flatten(0, 1)
