"""A decision that appends tokens, sums features of the encoder or sends its [CLS], applied in plain
words: the entries of each image one by one. Nothing here looks at how the package does it."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from vtc.types import Selection

from .fed import Fed
from .models import CROP, PATCH, PINPOINTS
from .oracle import Group, groups
from .prompts import Inputs, anyres_crops, cut_into_crops

# whose projector takes what is made of patches
PROJECTING = ("llava", "llava_siglip", "llava_next")


def has_slots(selection: Selection) -> bool:
    """Whether more is to be done than to put sums in the place of kept tokens."""
    appends = selection.slot_positions.shape[1] > selection.keep.shape[1]
    return appends or selection.merged == "encoder" or selection.sends_cls


def laid_out(
    model: Any, family: str, inputs: Inputs, given: Fed, selection: Selection
) -> tuple[Fed, Tensor]:
    """The entries of each image at its first columns, in order, and which columns those are; of
    each frame, where text stands between frames."""
    embeds, deep = given.embeds.clone(), None if given.deep is None else given.deep.clone()
    origin = torch.arange(embeds.shape[1]).repeat(len(embeds), 1)
    kept = torch.ones_like(given.mask, dtype=torch.bool)
    features, cls = encoder_features(model, family, inputs)
    for g, group in enumerate(groups(model, family, inputs)):
        whole = _wide(given, group.tokens)
        sums = _sums(selection, g, whole.shape[0])
        made = sums @ whole
        if features is not None and selection.merged == "encoder":
            with torch.no_grad():
                made = model.model.multi_modal_projector(sums @ features[g])
        entries = _entries(selection, g, group, whole, sums, made)
        if selection.sends_cls:
            assert cls is not None
            with torch.no_grad():
                first = model.model.multi_modal_projector(cls[g])
            place = group.tokens[selection.slot_positions[g, 0]]
            entries.insert(0, (first, int(place[1])))
        for newline in group.newlines:
            alive = torch.isin(_rest(selection, g), newline.members).any()
            if alive:
                column = int(newline.place[1])
                at = [i for i, (_, of) in enumerate(entries) if of < column]
                entries.insert(_behind(entries, group, newline, at), (_one(given, newline), column))
        row = int(group.tokens[0, 0])
        columns = sorted(group.tokens[:, 1].tolist() + [int(n.place[1]) for n in group.newlines])
        kept[row, columns] = False
        for column, (vector, of) in _placed(columns, entries):
            embeds[row, column] = vector[: embeds.shape[-1]]
            if deep is not None:
                deep[row, column] = vector[embeds.shape[-1] :]
            origin[row, column], kept[row, column] = of, True
    rows = torch.arange(len(embeds))[:, None]
    where = given.positions.expand(*given.positions.shape[:-2], len(embeds), -1)[..., rows, origin]
    return replace(given, embeds=embeds, deep=deep, positions=where, origin=origin), kept


def _placed(columns: list[int], entries: list[Any]) -> list[tuple[int, Any]]:
    """Each entry at a column of its own stretch; those that do not ascend are in the last one."""
    starts = [c for c in columns if c - 1 not in columns]
    bounds = [*starts[1:], columns[-1] + 1]
    free = [[c for c in columns if a <= c < b] for a, b in zip(starts, bounds, strict=True)]
    out, highest, at = [], -1, 0
    for entry in entries:
        if entry[1] < highest:  # it is appended
            at = len(free) - 1
        while at < len(free) - 1 and entry[1] >= bounds[at]:
            at += 1
        highest = max(highest, entry[1])
        out.append((free[at].pop(0), entry))
    return out


def _wide(given: Fed, places: Tensor) -> Tensor:
    at = tuple(places.T)
    return (
        given.embeds[at]
        if given.deep is None
        else torch.cat([given.embeds[at], given.deep[at]], -1)
    )


def _one(given: Fed, newline: Any) -> Tensor:
    return _wide(given, newline.place[None])[0]


def _rest(selection: Selection, g: int) -> Tensor:
    """Positions of all slots but [CLS]."""
    positions = selection.slot_positions[g, int(selection.sends_cls) :]
    return positions[positions >= 0]


def _sums(selection: Selection, g: int, n: int) -> Tensor:
    """How much of each token is in each slot, `[S, n]`; all zeros where a slot is a copy."""
    out = torch.zeros(selection.slot_positions.shape[1], n)
    if selection.merge is not None:
        for slot, token, weight in zip(*(x[g].tolist() for x in selection.merge), strict=True):
            out[slot, token] += weight
    return out


def _entries(
    selection: Selection, g: int, group: Group, whole: Tensor, sums: Tensor, made: Tensor
) -> list[tuple[Tensor, int]]:
    """What is sent of an image but [CLS] and newlines: kept tokens, then appended ones; each with
    the column whose position it takes."""
    found = []
    for slot in range(int(selection.sends_cls), sums.shape[0]):
        position = int(selection.slot_positions[g, slot])
        if position >= 0:
            is_sum = bool((sums[slot] != 0).any())
            found.append(
                (made[slot] if is_sum else whole[position], int(group.tokens[position, 1]))
            )
    return found


def _behind(entries: list[Any], group: Group, newline: Any, before: list[int]) -> int:
    """Where a newline goes: behind the kept tokens before it; the last one behind all."""
    if int(newline.place[1]) > int(group.tokens[-1, 1]):
        return len(entries)
    # kept tokens and newlines ascend, and what is appended comes after all of them
    ascending = 0
    while ascending + 1 < len(entries) and entries[ascending + 1][1] > entries[ascending][1]:
        ascending += 1
    return sum(1 for i in before if i <= ascending)


def encoder_features(
    model: Any, family: str, inputs: Inputs
) -> tuple[list[Tensor] | None, Tensor | None]:
    """Of each image what the projector is given for its tokens, and the [CLS], if there is one and
    it stands for the image; None where tokens are made of several patches."""
    if family not in PROJECTING or "pixel_values" not in inputs:
        return None, None
    pixels, layer = inputs["pixel_values"], model.config.vision_feature_layer
    crops = None
    if family in PINPOINTS:
        sizes, cut = inputs["image_sizes"], cut_into_crops(inputs)
        crops = [anyres_crops(family, *pair) for pair in zip(sizes.tolist(), cut, strict=True)]
        pixels = torch.cat([p[:n] for p, n in zip(pixels, crops, strict=True)])
    with torch.no_grad():
        out = model.model.vision_tower(pixels, output_hidden_states=True).hidden_states[layer]
    patches = (CROP[family] // PATCH) ** 2
    cls, out = out[:, 0], out[:, out.shape[1] - patches :]
    if crops is None:
        return list(out), cls
    packed, _ = model.model.pack_image_features(
        list(out.split(crops)),
        inputs["image_sizes"],
        vision_feature_select_strategy=model.config.vision_feature_select_strategy,
        image_newline=torch.full((out.shape[-1],), float("nan")),
    )
    return [p[~p[:, 0].isnan()] for p in packed], None
