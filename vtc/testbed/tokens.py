"""Questions straight to token ids, without text in between: lookup tables made by the tokenizer.

A question becomes a *slot*: its tokens behind the image, then the answer and the end token, then
padding. Slots of several questions about one image may follow each other (see packing.py).
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from vtc.testbed.families import llava
from vtc.testbed.questions import Questions
from vtc.testbed.scenes import OBJECTS
from vtc.testbed.vocabulary import ANSWERS, CAPTION, COLORS, PLURALS, SHAPES, TEMPLATES

# where each placeholder takes its word from: (column of `fillers`, words)
_SLOTS = {
    "c": (0, COLORS),
    "s": (1, SHAPES),
    "ss": (1, PLURALS),
    "d": (2, COLORS),
    "t": (3, SHAPES),
}
_CODES = {name: -2 - i for i, name in enumerate(_SLOTS)}
PAD_TARGET = -100


@dataclass(frozen=True)
class Slot:
    """Token ids of one question each, and which of them are to be predicted from where."""

    ids: Tensor  # long [B, L]
    at: Tensor  # long [B, n], positions in the slot whose output predicts a target
    targets: Tensor  # long [B, n], token ids, PAD_TARGET where there is none


class QuestionTokens:
    """Turns `Questions` into `Slot`s for one tokenizer, on one device."""

    def __init__(
        self,
        tokenizer: Any,
        device: str | torch.device = "cpu",
        before: str = llava.BEFORE,
        after: str = llava.AFTER,
    ) -> None:
        """Reads every template and word through the tokenizer once.

        `before` and `after` are what the chat format puts around a question, behind the pictures.
        """
        self._tokenizer = tokenizer
        self._device = torch.device(device)
        self.pad, self.eos = tokenizer.pad_token_id, tokenizer.eos_token_id
        self.before, self.after = before, after
        self._answers = torch.tensor([self._one(word) for word in ANSWERS], device=device)
        self._words = {
            name: torch.tensor([self._one(" " + word) for word in words], device=device)
            for name, (_, words) in _SLOTS.items()
        }
        self._tables = {kind: self._table(kind) for kind in TEMPLATES}

    def _ids(self, text: str) -> list[int]:
        return list(self._tokenizer(text, add_special_tokens=False)["input_ids"])

    def _one(self, word: str) -> int:
        ids = self._ids(word)
        if len(ids) != 1:
            raise ValueError(
                f"tokenizer: {word!r} is {len(ids)} tokens, expected 1: train it on all words"
            )
        return ids[0]

    def _table(self, kind: str) -> tuple[Tensor, Tensor]:
        """Template ids with codes for the placeholders [T, L], and their lengths [T]."""
        rows = []
        for template in TEMPLATES[kind]:
            row: list[int] = []
            text = f"{self.before}{template}{self.after}"
            for i, part in enumerate(re.split(r" \{(\w+)\}", text)):
                row += [_CODES[part]] if i % 2 else self._ids(part)
            rows.append(row)
        length = torch.tensor([len(row) for row in rows], device=self._device)
        answer = 3 * OBJECTS if kind == CAPTION else 3
        table = torch.full((len(rows), int(length.max()) + answer), self.pad, device=self._device)
        for i, row in enumerate(rows):
            table[i, : len(row)] = torch.tensor(row, device=self._device)
        return table, length

    def length(self, kind: str) -> int:
        """Tokens in a slot of `kind`."""
        return self._tables[kind][0].shape[1]

    def encode(self, kind: str, questions: Questions) -> Slot:
        """The slot of every question, with its answer of one or two tokens and the end token."""
        table, length = self._tables[kind]
        ids = table[questions.template]
        for name, (column, _) in _SLOTS.items():
            word = self._words[name][questions.fillers[:, column]]
            ids = torch.where(ids == _CODES[name], word[:, None], ids)
        second = questions.answer[:, 1]
        two = second >= 0
        tokens = self._answers[questions.answer.clamp(min=0)]
        end = torch.full_like(second, self.eos)
        none = torch.full_like(second, PAD_TARGET)
        targets = torch.stack(
            [tokens[:, 0], torch.where(two, tokens[:, 1], end), torch.where(two, end, none)], 1
        )
        return self._answered(ids, length[questions.template], targets)

    def encode_caption(self, colors: Tensor, shapes: Tensor) -> Slot:
        """The slot of "list the objects" with the objects as `questions.caption` orders them."""
        table, length = self._tables[CAPTION]
        rows = len(colors)
        first = self._answers[len(ANSWERS) - 4 - 16 : len(ANSWERS) - 4 - 8]  # colors, no space
        color = self._words["c"][colors.clamp(min=0)]
        color = torch.cat([first[colors[:, :1]], color[:, 1:]], 1)
        shape = self._words["s"][shapes.clamp(min=0)]
        comma = torch.full_like(color, self._one(","))
        there = colors >= 0
        last = there & ~torch.nn.functional.pad(there, (0, 1))[:, 1:]
        tail = torch.where(last, torch.full_like(comma, self.eos), comma)
        targets = torch.stack([color, shape, tail], -1)
        targets = targets.masked_fill(~there[..., None], PAD_TARGET).flatten(1)
        template = torch.zeros(rows, dtype=torch.long, device=colors.device)
        return self._answered(table[template], length[template], targets)

    def _answered(self, ids: Tensor, length: Tensor, targets: Tensor) -> Slot:
        """Writes the answer behind the question, whose last token predicts its first."""
        at = length[:, None] - 1 + torch.arange(targets.shape[1], device=ids.device)
        ids = ids.scatter(1, at + 1, torch.where(targets < 0, self.pad, targets))
        return Slot(ids, at, targets)
