"""What a patched model's steps keep of a call's images before the language model."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from vtc.errors import InputError, NeverCompressedError, UnsupportedModeError
from vtc.methods.base import Method
from vtc.runtime.images import Images
from vtc.runtime.peek import layer_input
from vtc.runtime.short import gather_groups
from vtc.scorers import RandomScores
from vtc.steps import decisions
from vtc.types import CLS_FEATURES, ENCODER_ROW, LLM_HIDDEN, TEXT, Selection, Signal, Tokens

if TYPE_CHECKING:
    from vtc.runtime.session import Session


def decided(
    session: Session, images: Images, features: Tensor, inputs: Mapping[str, Any]
) -> list[Selection]:
    """What each step in the encoder and before the LLM leaves, in order; none where none acts.

    Args:
        session: the patched model's state, once the encoder has run.
        images: of the call.
        features: their tokens in padded groups, `[G, N, D]`.
        inputs: of the call.
    """
    found = [_survivors(session, images)] if session.tower.cutting(images, session.budget) else []
    steps = [
        step
        for step in session.method.steps(session.budget)
        if step.method.site in ("pixels", "llm_input") and not step.keeps_all(images.lengths)
    ]
    tokens_of = partial(_tokens, session, images, features, inputs)
    with torch.no_grad():
        return found + decisions(steps, tokens_of, found[-1] if found else None)


def _survivors(session: Session, images: Images) -> Selection:
    """The decision of cuts inside the encoder, once it has run."""
    mask, width = session.tower.survivors(images), None
    if (encoded := session.encoded) is not None and encoded.survivors is not None:
        mask, width = encoded.survivors, max(encoded.counts)
    if mask is None:
        raise NeverCompressedError(
            "images were given, but the encoder was not run on them in this call; pass "
            "pixel_values, not features computed before"
        )
    return Selection.of_mask(
        mask, images.lengths, images.parent, images.grids, images.parts, width=width
    )


def _tokens(
    session: Session,
    images: Images,
    features: Tensor,
    inputs: Mapping[str, Any],
    method: Method,
    left: Selection | None,
) -> Tokens:
    """All tokens of each image, with what one method needs where this is left of them."""
    tower = session.tower
    # the encoder of a model spread over devices may be elsewhere
    needs = tuple(signal for signal in method.needs if signal.name != CLS_FEATURES)
    signals = {key: x.to(features.device) for key, x in session.signals(needs).items()}
    drawn = [s for s in tower.signals.draws if s in method.needs and s.key not in signals]
    if drawn or any(signal.name == "image_key" for signal in method.needs):
        signals["image_key"] = tower.keys(images, inputs)
    if any(signal.name == ENCODER_ROW for signal in method.needs):
        signals[ENCODER_ROW] = tower.encoder_rows(images)
    asks = any(signal.name == TEXT for signal in method.needs)
    text, text_valid, text_ids = _text(session, images, inputs) if asks else (None, None, None)
    tokens = Tokens(
        features=features,
        valid=images.to(features.device).valid,
        grid=images.grids,
        parent=images.parent,
        text=text,
        text_valid=text_valid,
        text_ids=text_ids,
        signals=signals,
        seed=session.seed,
        parts=images.parts,
        overview=images.overviews,
        counted=images.lengths,
    )
    for signal in drawn:
        signals[signal.key] = RandomScores()(tokens)[:, None]
    for signal in method.needs:
        if signal.name == LLM_HIDDEN:
            signals[signal.key] = _llm_hidden(session, images, signal, left)
    return tokens


def _text(
    session: Session, images: Images, inputs: Mapping[str, Any]
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Embeddings of the text behind the last image of each row, `[B, M, D]`, which are there,
    `bool[B, M]`, and its ids `[B, M]` where those were given; nothing of rows without images."""
    if session.prompt is not None:
        embeds, mask = session.prompt[0]["inputs_embeds"], session.prompt[1]
    else:
        ids = inputs["input_ids"]
        embeds = session.embedded(ids)
        mask = torch.ones_like(ids) if (given := inputs.get("attention_mask")) is None else given
    last = torch.full((len(mask),), mask.shape[1])
    # of what the encoder gave, newlines too, the last column in each row
    ends = torch.zeros_like(last).scatter_reduce_(
        0, images.places[:, 0], images.places[:, 1], "amax"
    )
    last[images.rows] = ends[images.rows]
    behind = (torch.arange(mask.shape[1]) > last[:, None]).to(mask.device) & (mask != 0)
    if not bool(behind.any(-1)[images.rows.to(mask.device)].all()):
        raise InputError(
            f"method {session.method.name!r} compares images with the text behind them and a row "
            "ends with an image, expected text after the last image of each row"
        )
    first = int(last.min()) + 1
    ids = inputs.get("input_ids")
    known = ids[:, first:] if isinstance(ids, Tensor) and ids.shape == mask.shape else None
    return embeds[:, first:], behind[:, first:], known


def _llm_hidden(session: Session, images: Images, signal: Signal, left: Selection | None) -> Tensor:
    """The input of a decoder layer at the visual tokens, `[G, N, D]`, run on what is left."""
    if session.prompt is None:
        raise UnsupportedModeError(
            f"method {session.method.name!r} looks into the language model before the prompt's "
            "run, expected images in front of an empty cache: pass the whole conversation "
            "without past_key_values"
        )
    depth = session.tower.facts.llm_depth
    (layer,) = signal.resolve(depth, depth - 1)
    given, mask, positions = session.prompt
    if left is not None:
        gone = images.valid & ~left.mask().cpu()
        rows = images.rows[:, None].expand_as(images.columns)
        mask = mask.index_put((rows[gone], images.columns[gone]), mask.new_zeros(()))
    return gather_groups(images, layer_input(session.adapter, layer, given, mask, positions))
