"""What a stock model feeds its language model, and that language model fed by hand."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from .oracle import positions
from .prompts import Inputs

FEATURES = ("get_image_features", "get_video_features")


@dataclass(frozen=True)
class Fed:
    """Inputs of a language model.

    Attributes:
        embeds: `[B, S, D]`.
        mask: `[B, S]`.
        positions: `[B, S]`, with M-RoPE `[4, B, S]`.
        visual: `bool[B, S]`, the places that DeepStack adds to, or None.
        deep: `[B, S, layers · D]`, what it adds there, or None.
        origin: `int64[B, S]`, the column whose position each takes; None: its own.
    """

    embeds: Tensor
    mask: Tensor
    positions: Tensor
    visual: Tensor | None = None
    deep: Tensor | None = None
    origin: Tensor | None = None

    def masked(self, kept: Tensor) -> Fed:
        """The same without attention to what is False in `kept [B, S]`."""
        return replace(self, mask=self.mask * kept)


class _Stop(Exception):
    pass


def fed(model: Any, inputs: Inputs, features: Sequence[Any] | None = None) -> Fed:
    """What the stock base model makes of these inputs, at the positions of generate; `features`
    are given in the place of what its encoder would say."""
    seen: dict[str, Any] = {}

    def stop(module: Any, args: Any, kwargs: dict[str, Any]) -> None:
        seen.update(kwargs)
        raise _Stop

    names = inspect.signature(model.model.forward).parameters
    hook = model.model.language_model.register_forward_pre_hook(stop, with_kwargs=True)
    try:
        with torch.no_grad(), played(model, features):
            model.model(**{k: v for k, v in inputs.items() if k in names})
    except _Stop:
        pass
    finally:
        hook.remove()
    where = positions(model, inputs)
    embeds, layers = seen["inputs_embeds"], seen.get("deepstack_visual_embeds")
    if not layers:
        return Fed(embeds, inputs["attention_mask"], where)
    visual = seen["visual_pos_masks"]
    deep = embeds.new_zeros(*embeds.shape[:2], len(layers) * embeds.shape[-1])
    deep[visual] = torch.cat(list(layers), -1)
    return Fed(embeds, inputs["attention_mask"], where, visual, deep)


@contextmanager
def recorded(model: Any) -> Iterator[list[Any]]:
    """Within it what the encoder says is written down, call by call."""
    said: list[Any] = []

    def wrap(real: Any) -> Any:
        @functools.wraps(real)
        def record(*args: Any, **kwargs: Any) -> Any:
            said.append(real(*args, **kwargs))
            return said[-1]

        return record

    with _replaced(model, wrap):
        yield said


@contextmanager
def played(model: Any, features: Sequence[Any] | None) -> Iterator[None]:
    """Within it the encoder says this, call by call; None: what it says by itself."""
    if features is None:
        yield
        return
    left = list(features)

    def wrap(real: Any) -> Any:
        @functools.wraps(real)
        def play(*args: Any, **kwargs: Any) -> Any:
            return left.pop(0)

        return play

    with _replaced(model, wrap):
        yield


@contextmanager
def _replaced(model: Any, wrap: Any) -> Iterator[None]:
    own = vars(model.model)
    names = [name for name in FEATURES if hasattr(model.model, name)]
    own.update({name: wrap(getattr(model.model, name)) for name in names})
    try:
        yield
    finally:
        for name in names:
            del own[name]


@contextmanager
def deepstack(model: Any, given: Fed) -> Iterator[None]:
    """Within it the next run of the language model adds the DeepStack features."""
    if given.deep is None or given.visual is None:
        yield
        return
    visual, deep, width = given.visual, given.deep, given.embeds.shape[-1]

    def add(module: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        hook.remove()
        times = len(kwargs["inputs_embeds"]) // len(visual)
        where = visual.repeat_interleave(times, 0)
        layers = deep.repeat_interleave(times, 0)[where].split(width, -1)
        more = {"visual_pos_masks": where, "deepstack_visual_embeds": list(layers)}
        return args, {**kwargs, **more}

    hook = model.model.language_model.register_forward_pre_hook(add, with_kwargs=True)
    try:
        yield
    finally:
        hook.remove()


def arguments(given: Fed) -> dict[str, Tensor]:
    """Keyword inputs of the whole model."""
    return {
        "inputs_embeds": given.embeds,
        "attention_mask": given.mask,
        "position_ids": given.positions,
    }


def joined(parts: Sequence[Fed], where: Tensor) -> Fed:
    """Parts of one conversation one behind the other, at the positions `where`."""
    deep = visual = None
    if some := next((part for part in parts if part.deep is not None), None):
        assert some.deep is not None
        wide = some.deep.shape[-1]
        deep = torch.cat([_deep(part, wide) for part in parts], 1)
        visual = torch.cat([_visual(part) for part in parts], 1)
    embeds = torch.cat([part.embeds for part in parts], 1)
    origins, start = [], 0
    for part in parts:
        own = torch.arange(part.mask.shape[1]).expand(len(part.mask), -1)
        origins.append(start + (own if part.origin is None else part.origin))
        start += part.mask.shape[1]
    where = where[..., torch.arange(len(embeds))[:, None], torch.cat(origins, 1)]
    return Fed(embeds, torch.cat([part.mask for part in parts], 1), where, visual, deep)


def _deep(part: Fed, width: int) -> Tensor:
    return part.embeds.new_zeros(*part.mask.shape, width) if part.deep is None else part.deep


def _visual(part: Fed) -> Tensor:
    return torch.zeros_like(part.mask, dtype=torch.bool) if part.visual is None else part.visual


def text(model: Any, ids: Tensor, mask: Tensor) -> Fed:
    """Text alone; its positions are said by `joined`."""
    return Fed(model.get_input_embeddings()(ids).detach(), mask, mask)


def packed(given: Fed, image: Tensor, kept: Tensor) -> tuple[Fed, list[list[int]]]:
    """What is kept alone, left-padded, at positions without gaps; and which columns each row is.

    `image [B, S]` says which image a column belongs to, −1 for text. With M-RoPE the tokens of an
    image keep their order on each axis, and what follows starts behind the furthest of them.
    """
    seen = kept & given.mask.bool()
    rows = [row.nonzero().flatten().tolist() for row in seen]
    width = max(map(len, rows))
    at = torch.tensor([[0] * (width - len(row)) + row for row in rows])
    mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows])
    b = torch.arange(len(rows))[:, None]
    where = torch.zeros(*given.positions.shape[:-1], width, dtype=torch.long)
    for r, row in enumerate(rows):
        ids = numbered(given.positions[..., r, :], image[r].tolist(), row)
        where[..., r, width - len(row) :] = ids
    visual = None if given.visual is None else given.visual[b, at] & mask.bool()
    deep = None if given.deep is None else given.deep[b, at]
    return Fed(given.embeds[b, at], mask, where, visual, deep), rows


def numbered(ids: Tensor, image: list[int], row: list[int]) -> Tensor:
    """Positions `[n]`, or `[4, n]`, without gaps of the columns `row` of those that have `ids`."""
    if ids.dim() == 1:
        return torch.arange(len(row))
    out = torch.zeros(len(ids), len(row), dtype=torch.long)
    out[0] = torch.arange(len(row))
    following = i = 0
    while i < len(row):
        end = i + 1
        if image[row[i]] < 0:
            out[1:, i] = following
            following, i = following + 1, end
            continue
        while end < len(row) and image[row[end]] == image[row[i]]:
            end += 1
        for axis in range(1, len(ids)):
            there = [int(ids[axis, column]) for column in row[i:end]]
            order = sorted(set(there))
            out[axis, i:end] = torch.tensor([following + order.index(p) for p in there])
        following, i = int(out[1:, i:end].max()) + 1, end
    return out
