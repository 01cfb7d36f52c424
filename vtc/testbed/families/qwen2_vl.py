"""The testbed's Qwen2-VL: no [CLS], M-RoPE, any size of picture, clips as temporal grids."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from vtc.testbed.families.text import ASSISTANT, END, PAD, START, build_tokenizer, corpus
from vtc.testbed.scenes import SIZE
from vtc.testbed.vocabulary import TEMPLATES

if TYPE_CHECKING:
    from transformers import Qwen2VLForConditionalGeneration, Qwen2VLProcessor

PATCH, MERGE = 4, 2
IMAGE, VIDEO = "<|image_pad|>", "<|video_pad|>"
VISION_START, VISION_END = "<|vision_start|>", "<|vision_end|>"
BEFORE, AFTER = "", ASSISTANT
# heights and widths that training mixes in beside 112×112, multiples of a token's 8 pixels
OTHER_SIZES = ((96, 96), (80, 80), (64, 64), (56, 56), (40, 40), (80, 112), (112, 80), (64, 96))

CHAT_TEMPLATE = """\
{%- for message in messages -%}
{{ '<|im_start|>' + message['role'] + '\\n' }}
{%- if message['content'] is string -%}
{{ message['content'] }}
{%- else -%}
{%- for part in message['content'] -%}
{%- if part['type'] == 'image' -%}{{ '<|vision_start|><|image_pad|><|vision_end|>' }}
{%- elif part['type'] == 'video' -%}{{ '<|vision_start|><|video_pad|><|vision_end|>' }}
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
    return build_tokenizer(
        corpus(TEMPLATES, BEFORE, "", ["user\n", "assistant\n", "\n"]),
        [PAD, START, END, VISION_START, VISION_END, IMAGE, VIDEO],
        pad_token=PAD,
        eos_token=END,
        extra_special_tokens={
            "im_start_token": START,
            "vision_start_token": VISION_START,
            "vision_end_token": VISION_END,
            "image_token": IMAGE,
            "video_token": VIDEO,
        },
    )


def build_processor() -> Qwen2VLProcessor:
    """The stock processor: 4-pixel patches, 2×2 to a token, no picture above 112×112 pixels."""
    from transformers import Qwen2VLImageProcessor, Qwen2VLProcessor, Qwen2VLVideoProcessor

    shared = {
        "size": {"shortest_edge": 16 * (PATCH * MERGE) ** 2, "longest_edge": SIZE * SIZE},
        "patch_size": PATCH,
        "merge_size": MERGE,
        "temporal_patch_size": 2,
    }
    return Qwen2VLProcessor(
        image_processor=Qwen2VLImageProcessor(**shared),
        tokenizer=tokenizer(),
        # a clip of a few frames is far below the cap, and unset it makes a warning
        video_processor=Qwen2VLVideoProcessor(**shared, cap_pixels_per_frame=False),
        chat_template=CHAT_TEMPLATE,
    )


def build_model(tokenizer: Any, small: bool = False) -> Qwen2VLForConditionalGeneration:
    """The untrained model in the stock class; `small` is a toy of the same layout for tests."""
    from transformers import Qwen2VLConfig, Qwen2VLForConditionalGeneration

    blocks, width, layers, hidden = (2, 64, 2, 64) if small else (8, 128, 6, 256)
    ids = {
        name: tokenizer.convert_tokens_to_ids(token)
        for name, token in (
            ("image_token_id", IMAGE),
            ("video_token_id", VIDEO),
            ("vision_start_token_id", VISION_START),
            ("vision_end_token_id", VISION_END),
        )
    }
    config = Qwen2VLConfig(
        vision_config={
            "depth": blocks,
            "embed_dim": width,
            "num_heads": width // 32,
            "hidden_size": hidden,
            "patch_size": PATCH,
            "spatial_merge_size": MERGE,
            "temporal_patch_size": 2,
        },
        text_config={
            "vocab_size": len(tokenizer),
            "hidden_size": hidden,
            "intermediate_size": hidden * 41 // 16,
            "num_hidden_layers": layers,
            "num_attention_heads": hidden // 32,
            "num_key_value_heads": hidden // 32,
            "max_position_embeddings": 2048,
            # the published theta turns the slow dimensions, the columns', by nothing at 14 tokens;
            # one much smaller leaves none that compare two tokens wherever they are
            "rope_parameters": {
                "rope_type": "default",
                "rope_theta": 100.0,
                "mrope_section": [4, 6, 6],
            },
            "bos_token_id": None,
            "eos_token_id": tokenizer.eos_token_id,
            "pad_token_id": tokenizer.pad_token_id,
        },
        tie_word_embeddings=False,
        **ids,
    )
    model = Qwen2VLForConditionalGeneration(config)
    # with the stock 0.02 the patches drown in what the first blocks add to all of them alike
    torch.nn.init.normal_(model.model.visual.patch_embed.proj.weight, std=0.1)
    return model
