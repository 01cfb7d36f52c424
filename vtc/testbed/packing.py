"""Several questions behind one set of pictures, in one sequence.

A sequence holds the pictures once and a slot for every question behind them. A mask hides the slots
from each other and each starts at the same position, so every slot sees exactly what it would see
alone: the pictures' tokens are paid for once and trained on many times.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

from vtc.testbed.changes import FRAMES
from vtc.testbed.questions import ALL_KINDS
from vtc.testbed.scenes import OBJECTS, SIZE
from vtc.testbed.tokens import QuestionTokens
from vtc.testbed.vocabulary import CAPTION

# what may stand before the questions, and the kind of each slot behind it
PICTURE, PAIR, CLIP = "picture", "pair", "clip"
SLOTS: dict[str, tuple[str, ...]] = {
    PICTURE: ALL_KINDS,
    PAIR: ("difference",) * 4,
    CLIP: ("change", "change", "motion"),
}
# phrasings of the slots of pairs and clips; None: any
PHRASINGS: dict[str, tuple[int | None, ...]] = {PAIR: (0, 1, 2, 3), CLIP: (0, 1, None)}


@dataclass(frozen=True)
class Prompt:
    """What stands before the question in a prompt of the real processor."""

    ids: Tensor  # long [P]
    visual: Tensor  # bool [P], the placeholders
    inputs: dict[str, Tensor]  # of the whole prompt, for the model


def targets_of(kind: str) -> int:
    """How many tokens a slot of `kind` predicts at most."""
    return 3 * OBJECTS if kind == CAPTION else 3


def read_prompt(
    processor: Any, tokens: QuestionTokens, form: str, size: tuple[int, int] = (SIZE, SIZE)
) -> Prompt:
    """The prompt of `form` with pictures of `size` (height, width), and no question."""
    image = Image.new("RGB", size[::-1])
    images = [image] * {PICTURE: 1, PAIR: 2, CLIP: 0}[form]
    videos = [[image] * FRAMES] if form == CLIP else None
    content = [*[{"type": "image"}] * len(images), *[{"type": "video"}] * bool(videos)]
    text = processor.apply_chat_template(
        [{"role": "user", "content": [*content, {"type": "text", "text": ""}]}],
        add_generation_prompt=True,
    )
    given = {"images": images or None, "videos": videos}
    inputs = processor(
        text=[text], return_tensors="pt", **{k: v for k, v in given.items() if v is not None}
    )
    end = processor.tokenizer(tokens.before + tokens.after, add_special_tokens=False)["input_ids"]
    ids = inputs["input_ids"][0]
    if ids[-len(end) :].tolist() != end:
        raise ValueError(f"{form}: the prompt does not end with {tokens.before + tokens.after!r}")
    marks = [getattr(processor, name, None) for name in ("image_token_id", "video_token_id")]
    visual = torch.isin(ids, torch.tensor([mark for mark in marks if mark is not None]))
    before = slice(len(ids) - len(end))
    return Prompt(ids[before], visual[before], dict(inputs))


class Packing(nn.Module):
    """Where everything is in the sequences of one form.

    Letters: P tokens of the prompt, S of the whole sequence, n targets, A axes of positions.
    """

    # buffers: [P], [1, 1, S, S], [1, S] or [A, 1, S], [n]
    ids: Tensor
    mask: Tensor
    positions: Tensor
    weight: Tensor

    def __init__(
        self, prompt: Prompt, places: Tensor, kinds: Sequence[str], tokens: QuestionTokens
    ) -> None:
        """Lays out a slot for each of `kinds`, behind a prompt with position ids [A, P]."""
        super().__init__()
        self.pad = tokens.pad
        self.shared = len(prompt.ids)
        self.runs = [
            (key, len(list(group))) for key, group in itertools.groupby(prompt.visual.tolist())
        ]
        lengths = [tokens.length(kind) for kind in kinds]
        # attention kernels want a length that is a multiple of 8
        self.padding = -(self.shared + sum(lengths)) % 8
        mask, behind = _packing(self.shared, [*lengths, self.padding])
        start = places.max() + 1
        positions = torch.cat([places, (start + behind).expand(len(places), -1)], 1)
        constants = {
            "ids": prompt.ids,
            "mask": mask[None, None],
            # one axis of positions: [1, S], several: [A, 1, S], as the stock models take them
            "positions": positions if len(places) == 1 else positions[:, None],
            "weight": _weights(kinds),
        }
        for name, value in constants.items():
            self.register_buffer(name, value, persistent=False)

    def embed(self, embed: nn.Module, features: Tensor, ids: Tensor) -> Tensor:
        """The sequence [B, S, D] of the pictures' tokens `features` [B, T, D] and slots' `ids`."""
        text, parts, place, used = embed(self.ids)[None], [], 0, 0
        for visual, count in self.runs:
            if visual:
                parts.append(features[:, used : used + count])
                used += count
            else:
                words = text[:, place : place + count].expand(len(features), -1, -1)
                parts.append(words.to(features.dtype))
            place += count
        slots = embed(F.pad(ids, (0, self.padding), value=self.pad))
        return torch.cat([*parts, slots.to(features.dtype)], 1)

    def hidden(self, keep: Tensor) -> Tensor:
        """The mask [B, 1, S, S] without the pictures' tokens outside `keep` [B, T]."""
        parts, used = [], 0
        for visual, count in self.runs:
            shown = keep[:, used : used + count] if visual else keep.new_ones(len(keep), count)
            used += count if visual else 0
            parts.append(shown)
        rest = self.mask.shape[-1] - self.shared
        parts.append(keep.new_ones(len(keep), rest))
        return self.mask & torch.cat(parts, 1)[:, None, None]


def _packing(shared: int, lengths: Sequence[int]) -> tuple[Tensor, Tensor]:
    """Who sees whom in the packed sequence `bool[S, S]`, and positions in the slots `[S - P]`."""
    slot = torch.cat([torch.full((n,), i) for i, n in enumerate([shared, *lengths])])
    order = torch.arange(len(slot))
    seen = (slot[:, None] == slot) | (slot == 0)
    behind = torch.cat([torch.arange(n) for n in lengths])
    return seen & (order[:, None] >= order), behind


def _weights(kinds: Sequence[str]) -> Tensor:
    """The weight of every target `[n]`: each slot counts the same, whatever its tokens."""
    usual = {CAPTION: 2 * OBJECTS, "number": 3}
    each = [torch.full((targets_of(kind),), 1 / usual.get(kind, 2) / len(kinds)) for kind in kinds]
    return torch.cat(each)
