"""Tokenizers trained on the testbed's words, for any chat format."""

from __future__ import annotations

import itertools
from collections.abc import Iterable
from typing import Any

from vtc.testbed.vocabulary import ANSWERS, COLORS, PLURALS, SHAPES, TEMPLATES

VOCABULARY = 640
# the format of Qwen and InternVL: <|im_start|>user\n … <|im_end|>\n<|im_start|>assistant\n
START, END, PAD = "<|im_start|>", "<|im_end|>", "<|endoftext|>"
ASSISTANT = f"{END}\n{START}assistant\n"


def corpus(kinds: Iterable[str], before: str, after: str, more: Iterable[str]) -> list[str]:
    """Text with every word, in the places where a chat has them."""
    lines = list(more)
    for kind in kinds:
        for template in TEMPLATES[kind]:
            for i, j in itertools.product(range(8), range(8)):
                text = template.format(
                    c=COLORS[i], s=SHAPES[j], ss=PLURALS[j], d=COLORS[j], t=SHAPES[i]
                )
                lines.append(f"{before}{text}{after}")
    lines += [f"{c} {s}, {d} {s}" for c in COLORS for s in SHAPES for d in COLORS]
    # a word alone must become one token as well
    return lines + [word for word in ANSWERS for _ in range(200)]


def build_tokenizer(lines: Iterable[str], special: list[str], **names: Any) -> Any:
    """Byte-level BPE: the testbed's words are one token each, digits too, any text can be read.

    Args:
        lines: text to train on.
        special: special tokens, in the order of their ids.
        names: what the tokenizer calls them (`pad_token`, `extra_special_tokens`, …).
    """
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
        special_tokens=special,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(lines, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        padding_side="left",
        model_max_length=2048,
        clean_up_tokenization_spaces=False,
        **names,
    )
