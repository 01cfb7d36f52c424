"""What a compressed model must equal: the stock model that does not attend to dropped tokens."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from vtc.types import Selection

from .models import PINPOINTS
from .prompts import (
    Inputs,
    Kind,
    anyres_crops,
    cut_into_crops,
    placeholders,
    take_rows,
    tokens_per_crop,
)

VISUAL = {
    "pixel_values",
    "pixel_values_videos",
    "image_sizes",
    "batch_num_images",
    "image_grid_thw",
    "video_grid_thw",
    "second_per_grid_ts",
}


@dataclass(frozen=True)
class Newline:
    """A newline token: its (row, column) in the batch, and which tokens of its group it ends."""

    place: Tensor
    members: Tensor


@dataclass(frozen=True)
class Group:
    """One image or video: `int64[N, 2]` (row, column) of its tokens, and its newline tokens."""

    kind: Kind
    tokens: Tensor
    newlines: tuple[Newline, ...] = ()


def groups(model: Any, family: str, inputs: Inputs) -> list[Group]:
    """Images, then videos, each in the order of their placeholders."""
    images = placeholders(family, inputs, "image")
    flags = [torch.zeros(len(places), dtype=torch.bool) for places in images]
    bases = [0] * len(images)
    if images and family in PINPOINTS:
        flags, bases = _packed(model, family, inputs)
    made = [_group("image", *parts) for parts in zip(images, flags, bases, strict=True)]
    for places in placeholders(family, inputs, "video"):
        flag = torch.zeros(len(places), dtype=torch.bool)
        flag[-1] = family == "llava_onevision"
        made.append(_group("video", places, flag, 0))
    return made


def _packed(model: Any, family: str, inputs: Inputs) -> tuple[list[Tensor], list[int]]:
    """From the stock packing: which tokens are newlines, and how many precede the rows."""
    sizes, cut = inputs["image_sizes"], cut_into_crops(inputs)
    crops = [anyres_crops(family, *pair) for pair in zip(sizes.tolist(), cut, strict=True)]
    n = tokens_per_crop(family)
    packed, _ = model.model.pack_image_features(
        [torch.zeros(count, n, 1) for count in crops],
        sizes,
        image_newline=torch.tensor([float("nan")]),
        **(
            {"vision_feature_select_strategy": model.config.vision_feature_select_strategy}
            if family == "llava_next"
            else {"vision_aspect_ratio": model.config.vision_aspect_ratio}
        ),
    )
    return [p[:, 0].isnan() for p in packed], [n if count > 1 else 0 for count in crops]


def _group(kind: Kind, places: Tensor, newline: Tensor, base: int) -> Group:
    index, start, ends = (~newline).cumsum(0), base, []
    for at in newline.nonzero().flatten().tolist():
        stop = int(index[at])
        ends.append(Newline(places[at], torch.arange(start, stop)))
        start = stop
    return Group(kind, places[~newline], tuple(ends))


def visual_places(model: Any, family: str, inputs: Inputs) -> list[Tensor]:
    """Per image or video `int64[N, 2]`: (row, column) of its tokens, newline tokens left out."""
    return [group.tokens for group in groups(model, family, inputs)]


def newlines(model: Any, family: str, inputs: Inputs) -> list[tuple[Newline, ...]]:
    """Per image or video its newline tokens."""
    return [group.newlines for group in groups(model, family, inputs)]


def select(model: Any, family: str, inputs: Inputs, keep: float, seed: int = 0) -> Selection:
    """A random selection of this share of each image's and video's tokens, at least one."""
    generator = torch.Generator().manual_seed(seed)
    places = visual_places(model, family, inputs)
    lengths = tuple(map(len, places))
    width = max(1, *(round(keep * n) for n in lengths))
    kept = torch.zeros(len(lengths), width, dtype=torch.int64)
    valid = torch.zeros(len(lengths), width, dtype=torch.bool)
    for g, n in enumerate(lengths):
        count = max(1, round(keep * n))
        kept[g, :count] = torch.randperm(n, generator=generator)[:count].sort().values
        valid[g, :count] = True
    parent = torch.tensor([[g, int(p[0, 0])] for g, p in enumerate(places)])
    return Selection(kept, valid, lengths, parent, tuple((1, 1, n) for n in lengths))


def kept_columns(
    model: Any, family: str, inputs: Inputs, selections: Selection | Sequence[Selection]
) -> Tensor:
    """`bool[B, S]`: False where a token was dropped, or a newline token with all of its row."""
    given = [selections] if isinstance(selections, Selection) else selections
    masks = [mask[:n] for s in given for mask, n in zip(s.mask().cpu(), s.lengths, strict=True)]
    out = torch.ones_like(inputs["input_ids"], dtype=torch.bool)
    for group, mask in zip(groups(model, family, inputs), masks, strict=True):
        assert len(mask) == len(group.tokens), (len(mask), len(group.tokens))
        out[tuple(group.tokens[~mask].T)] = False
        for newline in group.newlines:
            out[tuple(newline.place)] = bool(mask[newline.members].any())
    return out


def positions(model: Any, inputs: Inputs) -> Tensor:
    """The position ids that generate makes of these inputs: `[B, S]`, Qwen's `[4, B, S]`."""
    if "position_ids" in inputs:
        return inputs["position_ids"]
    deltas = getattr(model.model, "rope_deltas", None)
    rest = {name: value for name, value in inputs.items() if name != "input_ids"}
    out = model._prepare_position_ids_for_generation(inputs["input_ids"], rest)
    if hasattr(model.model, "rope_deltas"):
        model.model.rope_deltas = deltas
    return out


def masked(
    model: Any, family: str, inputs: Inputs, selections: Selection | Sequence[Selection]
) -> Inputs:
    """Inputs of the stock model: dropped tokens are masked out, positions are the original ones."""
    kept = kept_columns(model, family, inputs, selections)
    return {
        **inputs,
        "attention_mask": inputs["attention_mask"] * kept,
        "position_ids": positions(model, inputs),
    }


@contextmanager
def _masks_from_layer(
    model: Any, layer: int, change: Callable[[Tensor, Tensor], Tensor]
) -> Iterator[None]:
    """Within it the masks of decoder layers from `layer` on are what `change` makes of them and of
    the hidden states."""

    def hook(module: Any, args: Any, kwargs: Any) -> Any:
        hidden = args[0] if args else kwargs["hidden_states"]
        mask = kwargs.get("attention_mask")
        if mask is None:
            mask = _causal(hidden, kwargs.get("past_key_values"), module.self_attn.layer_idx)
        return args, {**kwargs, "attention_mask": change(mask, hidden)}

    layers = model.model.language_model.layers[layer:]
    handles = [one.register_forward_pre_hook(hook, with_kwargs=True) for one in layers]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def masked_from_layer(model: Any, layer: int, keep: Tensor) -> Iterator[None]:
    """Within it decoder layers from `layer` on do not attend to columns where `keep [B, S]` is
    False."""

    def narrowed(mask: Tensor, hidden: Tensor) -> Tensor:
        return _narrowed(mask, keep, len(hidden))

    with _masks_from_layer(model, layer, narrowed):
        yield


@contextmanager
def merged_at_layer(
    model: Any, family: str, inputs: Inputs, layer: int, selection: Selection, offset: int = 0
) -> Iterator[None]:
    """Within it the hidden states that enter `layer` in a prefill are, of tokens that others were
    merged into, the weighted sums that the selection says; the prompt begins at column `offset`."""
    parts: dict[tuple[int, int], list[tuple[int, float]]] = {}
    assert selection.merge is not None
    for g, group in enumerate(groups(model, family, inputs)):
        for slot, token, weight in zip(*(x[g].tolist() for x in selection.merge), strict=True):
            if weight:
                row, column = group.tokens[int(selection.keep[g, slot])].tolist()
                member = int(group.tokens[token, 1])
                parts.setdefault((row, column), []).append((member, weight))

    def hook(module: Any, args: Any, kwargs: Any) -> Any:
        hidden = args[0] if args else kwargs["hidden_states"]
        if hidden.shape[1] < offset + inputs["input_ids"].shape[1]:
            return None
        copies, out = len(hidden) // len(inputs["input_ids"]), hidden.clone()
        for (row, column), members in parts.items():
            for copy in range(row * copies, (row + 1) * copies):
                out[copy, offset + column] = sum(w * hidden[copy, offset + m] for m, w in members)
        return ((out, *args[1:]), kwargs) if args else (args, {**kwargs, "hidden_states": out})

    one = model.model.language_model.layers[layer]
    handle = one.register_forward_pre_hook(hook, with_kwargs=True)
    try:
        yield
    finally:
        handle.remove()


def sizes(model: Any, family: str, inputs: Inputs, selection: Selection) -> Tensor:
    """`[B, S]`: of how many each token is the mean that a selection says, 1 elsewhere."""
    out = torch.ones(inputs["input_ids"].shape)
    assert selection.merge is not None
    for g, group in enumerate(groups(model, family, inputs)):
        for slot, weight in zip(*(selection.merge[i][g].tolist() for i in (0, 2)), strict=True):
            if weight:
                out[tuple(group.tokens[int(selection.keep[g, slot])])] = round(1 / weight)
    return out


@contextmanager
def weighed_from_layer(model: Any, layer: int, size: Tensor) -> Iterator[None]:
    """Within it decoder layers from `layer` on add log `size [B, S]` to the logits on columns."""

    def weighed(mask: Tensor, hidden: Tensor) -> Tensor:
        if mask.dtype == torch.bool:
            lowest = torch.finfo(hidden.dtype).min
            mask = torch.zeros(mask.shape).masked_fill(~mask, lowest)
        rows = size.log().repeat_interleave(len(hidden) // len(size), dim=0)[:, : mask.shape[-1]]
        bias = torch.nn.functional.pad(rows, (0, mask.shape[-1] - rows.shape[1]))
        return mask + bias[:, None, None]

    with _masks_from_layer(model, layer, weighed):
        yield


def _causal(hidden: Tensor, cache: Any, layer: int) -> Tensor:
    queries = hidden.shape[1]
    seen, width = 0, queries
    if cache is not None:
        # a number: a static cache counts on in the tensor that it returns
        seen, width = int(cache.get_seq_length(layer)), cache.get_mask_sizes(queries, layer)[0]
    last = seen + torch.arange(queries, device=hidden.device)
    return (torch.arange(width, device=hidden.device) <= last[:, None])[None, None]


def _narrowed(mask: Tensor, keep: Tensor, batch: int) -> Tensor:
    width = mask.shape[-1]
    columns = torch.ones(batch, 1, 1, width, dtype=torch.bool, device=mask.device)
    rows = keep.repeat_interleave(batch // len(keep), dim=0)[:, :width]
    columns[:, 0, 0, : rows.shape[1]] = rows
    lowest = None if mask.dtype == torch.bool else torch.finfo(mask.dtype).min
    seen = (mask if lowest is None else mask > lowest) & columns
    narrow = seen if lowest is None else mask.masked_fill(~columns, lowest)
    # a token that may attend to nothing would become NaN, which a weight of 0 does not remove
    return torch.where(seen.any(-1, keepdim=True), narrow, mask)


@contextmanager
def rows_expanded_by_hand(model: Any, family: str) -> Iterator[None]:
    """Within it a stock model repeats whole rows for beams: below transformers 5.18 most families
    interleave the images of a row (A, A, B, B for A, B, A, B)."""
    stock = model._expand_inputs_for_generation

    def expand(expand_size: int = 1, input_ids: Any = None, **kwargs: Any) -> Any:
        # newer versions have encoded the pixels by now
        if expand_size == 1 or not kwargs.keys() & {"pixel_values", "pixel_values_videos"}:
            return stock(expand_size=expand_size, input_ids=input_ids, **kwargs)
        names = [name for name, value in kwargs.items() if value is not None and name in VISUAL]
        visual = {name: kwargs.pop(name) for name in names}
        ids, out = stock(expand_size=expand_size, input_ids=input_ids, **kwargs)
        rows = [row for row in range(len(input_ids)) for _ in range(expand_size)]
        return ids, out | take_rows(family, {**visual, "input_ids": input_ids}, rows)

    model._expand_inputs_for_generation = expand
    try:
        yield
    finally:
        del model._expand_inputs_for_generation
