"""The testbed's LLaVA: a CLIP tower with [CLS], 8-pixel patches, Llama behind it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from vtc.testbed.families.text import build_tokenizer, corpus
from vtc.testbed.questions import ALL_KINDS
from vtc.testbed.scenes import SIZE

if TYPE_CHECKING:
    from transformers import LlavaForConditionalGeneration, LlavaProcessor

PATCH = 8
GRID = SIZE // PATCH
PAD, BOS, EOS, IMAGE = "<pad>", "<s>", "</s>", "<image>"
BEFORE, AFTER = "\n", " ASSISTANT:"

# "USER: <image>\nquestion ASSISTANT:", the images first, as LLaVA-1.5 has it
CHAT_TEMPLATE = """\
{%- for message in messages -%}
{%- if message['role'] == 'assistant' -%}
{{ 'ASSISTANT:' }}{% set images, end = '', eos_token %}
{%- else -%}
{{ message['role'].upper() + ': ' }}{% set end = ' ' %}
{%- endif -%}
{%- if message['content'] is string -%}
{{ message['content'] }}
{%- else -%}
{%- for part in message['content'] if part['type'] == 'image' -%}{{ '<image>\\n' }}{%- endfor -%}
{%- for part in message['content'] if part['type'] == 'text' -%}{{ part['text'] }}{%- endfor -%}
{%- endif -%}
{{ end }}
{%- endfor -%}
{%- if add_generation_prompt -%}{{ 'ASSISTANT:' }}{%- endif -%}
"""


def tokenizer() -> Any:
    """The tokenizer, trained anew; always the same."""
    return build_tokenizer(
        corpus(ALL_KINDS, BEFORE, AFTER, ["USER: ", "\n"]),
        [PAD, BOS, EOS, IMAGE],
        pad_token=PAD,
        bos_token=BOS,
        eos_token=EOS,
        extra_special_tokens={"image_token": IMAGE},
    )


def build_processor() -> LlavaProcessor:
    """The stock processor over it: 112 pixels, CLIP's normalization, a chat template."""
    from transformers import CLIPImageProcessor, LlavaProcessor

    pixels = {"height": SIZE, "width": SIZE}
    images = CLIPImageProcessor(size={"shortest_edge": SIZE}, crop_size=pixels)
    return LlavaProcessor(
        image_processor=images,
        tokenizer=tokenizer(),
        patch_size=PATCH,
        vision_feature_select_strategy="default",
        chat_template=CHAT_TEMPLATE,
        image_token=IMAGE,
        num_additional_image_tokens=1,
    )


def build_model(tokenizer: Any, small: bool = False) -> LlavaForConditionalGeneration:
    """The untrained model in the stock class; `small` is a toy of the same layout for tests."""
    from transformers import (
        CLIPVisionConfig,
        LlamaConfig,
        LlavaConfig,
        LlavaForConditionalGeneration,
    )

    blocks, width, layers, hidden = (3, 64, 2, 64) if small else (8, 160, 6, 256)
    vision = CLIPVisionConfig(
        image_size=SIZE,
        patch_size=PATCH,
        hidden_size=width,
        intermediate_size=4 * width,
        num_hidden_layers=blocks,
        num_attention_heads=width // 32,
        projection_dim=width,
    )
    text = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=hidden,
        intermediate_size=hidden * 43 // 16,
        num_hidden_layers=layers,
        num_attention_heads=hidden // 32,
        num_key_value_heads=hidden // 32,
        max_position_embeddings=2048,
        rms_norm_eps=1e-5,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        tie_word_embeddings=False,
    )
    config = LlavaConfig(
        vision_config=vision,
        text_config=text,
        image_token_id=tokenizer.convert_tokens_to_ids(IMAGE),
        image_seq_length=GRID * GRID,
        vision_feature_layer=-2,
        vision_feature_select_strategy="default",
        projector_hidden_act="gelu",
        tie_word_embeddings=False,
    )
    return LlavaForConditionalGeneration(config)
