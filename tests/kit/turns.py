"""Conversations of two turns on one cache, and the same in one piece."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from .fed import Fed, joined, text
from .matrix import WEIGHED, Decision, Spec, run_fed, statement
from .models import PINPOINTS
from .oracle import (
    kept_columns,
    masked_from_layer,
    merged_at_layer,
    positions,
    sizes,
    weighed_from_layer,
)
from .plain_methods import prompt_of
from .plain_rows import Prompt, restated
from .prompts import Inputs, Part, build_inputs, take_rows

TEXT = ("input_ids", "attention_mask", "mm_token_type_ids")
Rows = list[list[Part]]
CONVERSATIONS: dict[str, tuple[Rows, Rows]] = {
    "a text turn": ([[3, "image", 4], [2, ("image", 24, 24), "image", 3]], [[6], [3]]),
    "a new image": (
        [[3, "image", 4], [2, ("image", 24, 24), "image", 3]],
        [[2, ("image", 32, 24), 3], [4]],
    ),
    "images after text": ([[5], [7]], [[2, ("image", 32, 24), 3], [1, "image", 2]]),
}
VIDEOS: dict[str, tuple[Rows, Rows]] = {
    "a text turn after a video": ([[3, "video", 4], [2, ("image", 24, 24), 3]], [[2], [5]]),
    "a video, then an image": ([[3, "video", 4]], [[2, ("image", 32, 24), 3]]),
    "an image, then a video": ([[2, ("image", 24, 24), 3]], [[1, "video", 4]]),
}


def pixels(inputs: Inputs) -> Inputs:
    """What belongs to pixels."""
    return {name: value for name, value in inputs.items() if name not in TEXT}


def whole(family: str, first: Inputs, answer: Tensor, second: Inputs) -> Inputs:
    """Ids, mask and token types of the conversation, and the pixels of both parts row by row."""
    ids = [first["input_ids"], answer, second["input_ids"]]
    mask = [first["attention_mask"], torch.ones_like(answer), second["attention_mask"]]
    out = {"input_ids": torch.cat(ids, 1), "attention_mask": torch.cat(mask, 1)}
    if "mm_token_type_ids" in first:
        types = [first["mm_token_type_ids"], torch.zeros_like(answer), second["mm_token_type_ids"]]
        out["mm_token_type_ids"] = torch.cat([part.int() for part in types], 1)
    parts = [
        take_rows(family, part, [row]) for row in range(len(answer)) for part in (first, second)
    ]
    for name in dict.fromkeys(name for part in parts for name in part):
        found = [part[name] for part in parts if name in part]
        if name == "pixel_values" and family in PINPOINTS:
            most = max(crops.shape[1] for crops in found)
            found = [pad(c, (0, 0, 0, 0, 0, 0, 0, most - c.shape[1])) for c in found]
        out[name] = torch.cat(found)
    return out


def parts(family: str, name: str) -> tuple[Inputs, Inputs]:
    """Both prompts of a conversation."""
    first, second = (CONVERSATIONS | VIDEOS)[name]
    return build_inputs(family, first, seed=1), build_inputs(family, second, seed=2)


def two_turns(
    model: Any, family: str, first: Inputs, second: Inputs, run: Any, pixels_of: str
) -> Iterator[Any]:
    """Yields after each turn: the answer to the first, then to the second."""
    one = run(model, first, return_dict_in_generate=True)
    answer = one.sequences[:, first["input_ids"].shape[1] :]
    yield answer
    given = whole(family, first, answer, second)
    if pixels_of == "new part":
        given = {name: given[name] for name in TEXT if name in given} | pixels(second)
    yield run(model, given, past_key_values=one.past_key_values)


def _stated(
    model: Any, spec: Spec, family: str, part: Inputs, made: Decision
) -> tuple[Fed, Tensor]:
    if not pixels(part):
        alone = text(model, part["input_ids"], part["attention_mask"])
        return alone, torch.ones_like(part["attention_mask"], dtype=torch.bool)
    return statement(model, spec, family, part, made)


@contextmanager
def _later(
    model: Any,
    family: str,
    answer: Tensor,
    turns: list[tuple[Inputs, Decision]],
    weighed: bool,
) -> Iterator[None]:
    layers = {layer for _, made in turns for layer in made.later}
    with ExitStack() as stack:
        offset = 0
        for part, made in turns:
            for layer, selection in made.later.items():
                if selection.merge is not None:
                    given = model, family, part, layer + 1, selection, offset
                    stack.enter_context(merged_at_layer(*given))
            offset = part["input_ids"].shape[1] + answer.shape[1]
        for layer in layers:
            kept = [
                kept_columns(model, family, part, made.later[layer])
                if layer in made.later
                else torch.ones_like(part["input_ids"], dtype=torch.bool)
                for part, made in turns
            ]
            kept.insert(1, torch.ones_like(answer, dtype=torch.bool))
            stack.enter_context(masked_from_layer(model, layer + 1, torch.cat(kept, 1)))
            if weighed:
                size = [
                    sizes(model, family, part, made.later[layer])
                    if layer in made.later and made.later[layer].merge is not None
                    else torch.ones(part["input_ids"].shape)
                    for part, made in turns
                ]
                size.insert(1, torch.ones(answer.shape))
                stack.enter_context(weighed_from_layer(model, layer + 1, torch.cat(size, 1)))
        yield


def _placed(model: Any, family: str, part: Inputs) -> Prompt:
    if pixels(part):
        return prompt_of(model, family, part)
    nothing = torch.zeros_like(part["input_ids"], dtype=torch.bool)
    return Prompt(nothing, torch.full((*nothing.shape, 3), -1), nothing, nothing)


def _conversation(a: Prompt, answer: Tensor, b: Prompt) -> Prompt:
    """Where things stand in the whole; sinks are looked for in turns with pictures, row by row, and
    text is behind the last visual token that there was when it was read: the last token of an
    answer is read with the next turn."""
    middle = torch.zeros_like(answer, dtype=torch.bool)
    late = middle[:, -1:]
    seen, again = (part.visual.any(-1, keepdim=True) for part in (a, b))
    parts = a.cells.amax() + 1
    cells = torch.where(b.visual[..., None], b.cells + parts * torch.tensor([1, 0, 0]), b.cells)
    between = torch.full((*answer.shape, 3), -1)
    return Prompt(
        torch.cat([a.visual, middle, b.visual], 1),
        torch.cat([a.cells, between, cells], 1),
        torch.cat([a.written & seen, middle[:, 1:], again | late, b.written & again], 1),
        torch.cat(
            [a.behind, seen | middle[:, 1:], seen & ~again | late, b.behind | (seen & ~again)], 1
        ),
    )


def in_one_piece(
    spec: Spec,
    family: str,
    turns: list[tuple[Inputs, Decision]],
    answer: Tensor,
    options: Mapping[str, Any],
) -> Tensor:
    """The second answer when the stock language model reads the conversation from its beginning,
    each part as its turn left it."""
    model, ((first, _), (second, _)) = spec.model(family), turns
    conversation = whole(family, first, answer, second)
    (a, kept_a), (b, kept_b) = (_stated(model, spec, family, *turn) for turn in turns)
    between = text(model, answer, torch.ones_like(answer))
    given = joined([a, between, b], positions(model, conversation))
    kept = torch.cat([kept_a, torch.ones_like(answer, dtype=torch.bool), kept_b], 1)
    placed = (_placed(model, family, part) for part in (first, second))
    prompt = _conversation(next(placed), answer, next(placed))
    with (
        _later(model, family, answer, turns, spec.name in WEIGHED),
        restated(model, prompt, spec.rules(family)) if spec.over_layers else nullcontext(),
    ):
        return run_fed(model, given.masked(kept), **options)
