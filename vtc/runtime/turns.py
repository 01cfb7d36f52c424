"""One turn of a conversation: what is new in it, and how it continues what a cache holds."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from vtc.errors import InputError, UnsupportedModeError
from vtc.runtime.cache import CacheState, filled
from vtc.runtime.images import Images
from vtc.runtime.report import kv_lengths
from vtc.runtime.session import Session
from vtc.runtime.short import Short, following


@dataclass(frozen=True, eq=False)
class Turn:
    """The part of a prompt that the cache does not hold yet.

    Attributes:
        inputs: keyword inputs of the model for that part: ids `[B, S]`, pixels.
        mask: `[B, S]`.
        position_ids: `[(P,) B, S]`.
        whole_mask: `[B, W]` over the whole prompt, as the caller gave it.
        past: `[B, T]`, which entries of the cache are attended to; None: it is empty.
        images: those of this part, or None.
        shift: how far positions have moved down before.
    """

    inputs: Mapping[str, Any]
    mask: Tensor
    position_ids: Tensor
    whole_mask: Tensor
    past: Tensor | None = None
    images: Images | None = None
    shift: Tensor | None = None

    @cached_property
    def unpadded(self) -> bool:
        """Whether the caller's mask hides nothing."""
        return bool((self.whole_mask == 1).all())

    def continued(self, short: Short | None, session: Session) -> dict[str, Tensor]:
        """Arguments of the stock generate, which slices off what stands for the cache.

        `short` is None for a part without images.
        """
        embeds, mask, ids = (
            (session.embedded(self.inputs["input_ids"]), self.mask, self.position_ids)
            if short is None
            else (short.inputs_embeds, short.attention_mask, short.position_ids)
        )
        if self.past is not None:
            past = self.past.to(mask.device)
            embeds = torch.cat([embeds.new_zeros(*past.shape, embeds.shape[-1]), embeds], 1)
            ids = torch.cat([ids.new_zeros(*ids.shape[:-1], past.shape[1]), ids], -1)
            mask = torch.cat([past.to(mask), mask], 1)
        return {"inputs_embeds": embeds, "attention_mask": mask, "position_ids": ids}

    def state(self, short: Short | None) -> CacheState:
        """What the cache is to remember once this part is in it."""
        mask = self.mask if short is None else short.attention_mask
        if short is None:
            ids = self.position_ids
            shift = ids.new_zeros(*ids.shape[:-1], 1) if self.shift is None else self.shift
            behind = following(ids, mask)
        else:
            shift = short.shift if self.shift is None else self.shift + short.shift
            behind = short.following
        return CacheState(
            prompt=self.whole_mask.shape[1],
            mask=mask if self.past is None else torch.cat([self.past.to(mask), mask], 1),
            shift=shift,
            following=behind,
            whole=short is None and self.images is None and self.past is None,
        )


def next_turn(
    session: Session, state: CacheState | None, kwargs: Mapping[str, Any], mask: Tensor
) -> Turn:
    """What is new in a conversation whose beginning is in `past_key_values`.

    Pixels may be those of the whole conversation or of the new part alone.

    Raises:
        InputError: the conversation is not longer than the cache, or its rows are others.
        UnsupportedModeError: images in a cache that this model did not fill.
    """
    ids: Tensor = kwargs["input_ids"]
    behind = filled(kwargs["past_key_values"])
    if kwargs.get("position_ids") is not None:
        raise UnsupportedModeError(
            "generate() got position_ids and a cache that is not empty, expected none: a later "
            "turn goes on where the cache ended"
        )
    if state is None:
        state = _uncompressed(session, ids, mask, behind)
    if not session.layers.cuts and len(set(lengths := kv_lengths(kwargs["past_key_values"]))) > 1:
        raise UnsupportedModeError(
            f"the cache's layers hold different numbers of entries, {min(lengths)} to "
            f"{max(lengths)}, expected one number: it was filled by a method that cuts between "
            "layers; patch the model with that method, or pass the whole conversation without "
            "past_key_values"
        )
    if len(state.mask) != len(ids):
        raise InputError(
            f"generate() got {len(ids)} rows and a cache of {len(state.mask)}, expected the same: "
            "pass the conversation of each row of the cache"
        )
    seen = state.prompt + behind - state.mask.shape[1]
    if ids.shape[1] <= seen:
        raise InputError(
            f"input_ids hold {ids.shape[1]} tokens and the cache stands for {seen}, expected more: "
            "pass the whole conversation, from its beginning, with its attention_mask"
        )
    part, images = _part(session, kwargs, seen)
    new, answer = mask[:, seen:], mask[:, state.prompt : seen]
    part["attention_mask"] = new
    past = torch.cat([state.mask[:, :behind], answer.to(state.mask)], 1)
    start = state.following + (answer != 0).sum(-1, keepdim=True).to(state.following)
    local = session.adapter.model._prepare_position_ids_for_generation(part["input_ids"], part)
    return Turn(
        inputs=part,
        mask=new,
        position_ids=(local + start.to(local.device)).masked_fill(new == 0, 0),
        whole_mask=mask,
        past=past,
        images=images,
        shift=state.shift,
    )


def _uncompressed(session: Session, ids: Tensor, mask: Tensor, behind: int) -> CacheState:
    """The state of a cache that holds text alone, or that another model filled."""
    held = ids[:, :behind]
    for token in (session.adapter.image_token_id, session.adapter.video_token_id):
        if token is not None and bool((held == token).any()):
            raise UnsupportedModeError(
                "generate() got a cache that holds images and was not filled by this patched "
                "model, expected one that was: pass the whole conversation without "
                "past_key_values"
            )
    past = mask[:, :behind]
    count = (past != 0).sum(-1, keepdim=True)
    return CacheState(prompt=behind, mask=past, shift=torch.zeros_like(count), following=count)


def _part(
    session: Session, kwargs: Mapping[str, Any], seen: int
) -> tuple[dict[str, Any], Images | None]:
    """Ids and pixels of what comes after the first `seen` tokens."""
    adapter = session.adapter
    part = {k: v for k, v in kwargs.items() if k not in (*adapter.visual_inputs, "past_key_values")}
    part["input_ids"] = kwargs["input_ids"][:, seen:]
    part.pop("position_ids", None)
    types = kwargs.get("mm_token_type_ids")
    if types is not None:
        part["mm_token_type_ids"] = types[:, seen:]
    tokens = (adapter.image_token_id, adapter.video_token_id)
    if not any(t is not None and bool((part["input_ids"] == t).any()) for t in tokens):
        part.pop("mm_token_type_ids", None)
        return part, None
    if not adapter.has_images(kwargs):
        session.check_text(part)
    pixels = {k: kwargs[k] for k in adapter.visual_inputs if kwargs.get(k) is not None}
    pixels.pop("mm_token_type_ids", None)
    alone = {**part, **pixels}
    try:
        return alone, session.images(alone)
    except InputError as error:
        try:
            whole = session.images({**alone, "input_ids": kwargs["input_ids"]})
        except InputError:
            raise error from None
    new = [g for g in range(len(whole.visuals)) if int(whole.columns[g, 0]) >= seen]
    alone = {**part, **adapter.part(pixels, list(whole.visuals), new)}
    return alone, session.images(alone)
