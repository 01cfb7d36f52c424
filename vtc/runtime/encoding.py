"""What the encoder gives for a call: by the stock model's own forward, or captured."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from torch import Tensor

from vtc.errors import InputError
from vtc.runtime.clock import Clock
from vtc.runtime.encodings import digest
from vtc.runtime.images import Images
from vtc.runtime.short import Short
from vtc.types import Selection

if TYPE_CHECKING:
    from vtc.runtime.session import Session


@dataclass(frozen=True, eq=False)
class Captured:
    """What a captured encoder gave.

    Attributes:
        kwargs: what the stock base model would feed its language model; empty where the short
            prompt is made.
        selection: the decision, or None: it was not made yet.
        short: the short prompt that goes with it.
    """

    kwargs: dict[str, Any]
    selection: Selection | None = None
    short: Short | None = None


class _Captured(Exception):
    def __init__(self, kwargs: dict[str, Any]) -> None:
        self.kwargs = kwargs


def encode(
    session: Session,
    images: Images,
    inputs: Mapping[str, Any],
    mask: Tensor,
    position_ids: Tensor,
    clock: Clock,
) -> Captured | None:
    """A captured encoder's tokens, and the short prompt where its making is captured too; None
    where the stock model has to encode."""
    if session.fast is None:
        return None
    session.check_window(mask.shape[1])
    found = session.fast.compress(images, inputs, mask, position_ids, clock)
    if found is None:
        return None
    session.encoded, done = found
    if done is not None:
        session._earlier = tuple(done[0][:-1])
        session.layers.draw_by(None, session.seed)
        selection = done[0][-1] if done[0] else session.everything(images)
        return Captured({}, selection, done[1])
    embeds = session.encoded.into(session.embedded(inputs["input_ids"]), images)
    clock.mark("encoded")
    return Captured({"inputs_embeds": embeds})


def stock_inputs(
    session: Session, images: Images, inputs: Mapping[str, Any], clock: Clock
) -> dict[str, Any]:
    """What the stock base model would feed its language model, which is not run."""
    names = inspect.signature(session.adapter.base.forward).parameters
    given = {k: v for k, v in inputs.items() if k in names and v is not None}
    encodings = None if session.tower.cutting(images, session.budget) else session.encodings
    if encodings is not None:
        key = digest(given)
        encoding = encodings.find(key, session.tower.signals.needed)
        if encoding is not None:
            session.recall(images, inputs, encoding.found)
            clock.mark("encoded")
            return dict(encoding.kwargs)

    def stop(module: Any, args: Any, kwargs: dict[str, Any]) -> None:
        raise _Captured(kwargs)

    hook = session.adapter.language_model.register_forward_pre_hook(
        stop, with_kwargs=True, prepend=True
    )
    try:
        with session.recording(images, inputs):
            session.adapter.base(**given)
    except _Captured as captured:
        clock.mark("encoded")
        if encodings is not None:
            encodings.add(key, captured.kwargs, session.tower.signals.found)
        return captured.kwargs
    finally:
        hook.remove()
    raise InputError("the model never called its language model; expected a stock forward")
