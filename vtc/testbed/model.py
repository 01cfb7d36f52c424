"""The testbed's LLaVA: stock classes, a tokenizer trained on the testbed's words, a processor."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vtc.errors import OptionError
from vtc.testbed.scenes import SIZE
from vtc.testbed.vocabulary import ANSWERS, COLORS, PLURALS, SHAPES, TEMPLATES

if TYPE_CHECKING:
    from transformers import LlavaForConditionalGeneration, LlavaProcessor

MODELS = Path(__file__).parent / "models"
FAMILIES = ("llava",)
PATCH = 8
GRID = SIZE // PATCH
VOCABULARY = 640
PAD, BOS, EOS, IMAGE = "<pad>", "<s>", "</s>", "<image>"

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


def model_folder(family: str = "llava") -> Path:
    """The folder of the trained model, for `from_pretrained`.

    `AutoModelForImageTextToText.from_pretrained(model_folder())` and
    `AutoProcessor.from_pretrained(model_folder())` load it, offline.
    """
    if family not in FAMILIES:
        raise OptionError(f"family: got {family!r}, expected one of {FAMILIES}")
    return MODELS / family


def corpus() -> list[str]:
    """Text with every word, in the places where a chat has them."""
    lines = ["USER: ", "\n"]
    for templates in TEMPLATES.values():
        for template in templates:
            for i, j in itertools.product(range(8), range(8)):
                text = template.format(
                    c=COLORS[i], s=SHAPES[j], ss=PLURALS[j], d=COLORS[j], t=SHAPES[i]
                )
                lines.append(f"\n{text} ASSISTANT:")
    lines += [f"{c} {s}, {d} {s}" for c in COLORS for s in SHAPES for d in COLORS]
    # a word alone must become one token as well
    return lines + [word for word in ANSWERS for _ in range(200)]


def build_tokenizer() -> Any:
    """Byte-level BPE: the testbed's words are one token each, digits too, any text can be read."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    # a digit is its own piece without the space before it, so "47" is "4", "7"
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(r"\d"), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=[PAD, BOS, EOS, IMAGE],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(corpus(), trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=PAD,
        bos_token=BOS,
        eos_token=EOS,
        extra_special_tokens={"image_token": IMAGE},
        padding_side="left",
        model_max_length=2048,
        clean_up_tokenization_spaces=False,
    )


def build_processor() -> LlavaProcessor:
    """The stock processor over it: 112 pixels, CLIP's normalization, a chat template."""
    from transformers import CLIPImageProcessor, LlavaProcessor

    pixels = {"height": SIZE, "width": SIZE}
    images = CLIPImageProcessor(size={"shortest_edge": SIZE}, crop_size=pixels)
    return LlavaProcessor(
        image_processor=images,
        tokenizer=build_tokenizer(),
        patch_size=PATCH,
        vision_feature_select_strategy="default",
        chat_template=CHAT_TEMPLATE,
        image_token=IMAGE,
        num_additional_image_tokens=1,
    )


def build_model(tokenizer: Any, small: bool = False) -> LlavaForConditionalGeneration:
    """The untrained model in the stock class; `small` is a toy of the same layout for tests."""
    from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig
    from transformers import LlavaForConditionalGeneration as Llava

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
    return Llava(config)
