"""The `forward` seam: short inputs for the language model, full-length results for its caller.

Serves direct calls (labels, scoring, own decoding loops) and assisted decoding. What later steps
need to know travels on the cache object, so that it lives exactly as long as the cache does.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from vtc.errors import NeverCompressedError, UnsupportedModeError
from vtc.runtime.clock import Clock
from vtc.runtime.images import Images
from vtc.runtime.session import Session, Short, gather_groups
from vtc.types import Selection

_STATE = "_vtc_compressed"


@dataclass(frozen=True, eq=False)
class CacheState:
    """What a cache with a compressed prompt must remember.

    Attributes:
        prompt: length of the original prompt.
        mask: `[B, L]` over the entries in the cache.
        shift: `[(P,) B, 1]`, subtracted from later position ids given by the caller.
        last: `[(P,) B, 1]`, the last position id of the prompt.
    """

    prompt: int
    mask: Tensor
    shift: Tensor
    last: Tensor


def remember(cache: Any, short: Short) -> None:
    """Note on a cache that its prompt was compressed."""
    if cache is not None:
        last = short.position_ids[..., -1:]
        state = CacheState(short.compaction.length, short.attention_mask, short.shift, last)
        setattr(cache, _STATE, state)


def remembered(cache: Any) -> CacheState | None:
    """The state on a cache, if it holds a compressed prompt now."""
    state = getattr(cache, _STATE, None)
    if state is not None and int(cache.get_seq_length()) == 0:
        delattr(cache, _STATE)  # a static cache that was reset for another prompt
        return None
    return state


@dataclass
class _Pending:
    """A forward with images that is under way."""

    images: Images
    inputs: dict[str, Any]
    clock: Clock
    small: list[Tensor] | None = None
    selection: Selection | None = None
    restore: Short | None = None


class ForwardSeam:
    """Hooks on the base model and its language model.

    Args:
        session: the patched model's state.
    """

    def __init__(self, session: Session) -> None:
        self.session = session
        self._hooks: list[Any] = []
        self._pending: _Pending | None = None
        self._expected: tuple[Images, dict[str, Any], Clock] | None = None
        self._recording = ExitStack()
        self.attach()

    def attach(self) -> None:
        """Register the hooks."""
        base, language_model = self.session.adapter.base, self.session.adapter.language_model
        self._hooks = [
            base.register_forward_pre_hook(self._before_base, with_kwargs=True),
            base.register_forward_hook(self._after_base, always_call=True),
            language_model.register_forward_pre_hook(self._before_language, with_kwargs=True),
            language_model.register_forward_hook(self._after_language, with_kwargs=True),
        ]

    def detach(self) -> None:
        """Remove the hooks and everything a broken-off call left."""
        while self._hooks:
            self._hooks.pop().remove()
        self._recording.close()
        self._pending = None

    @contextmanager
    def suspended(self) -> Iterator[None]:
        """Within it the model is stock, so that compiled decoding has nothing to trace."""
        attached = bool(self._hooks)
        self.detach()
        try:
            yield
        finally:
            if attached:
                self.attach()

    @contextmanager
    def expecting(self, images: Images, inputs: dict[str, Any], clock: Clock) -> Iterator[None]:
        """Within it a stock generate runs on these images; the tower may run before the base."""
        self._expected = (images, inputs, clock)
        with self.session.signals.recording():
            try:
                yield
            finally:
                self._expected = None

    def _before_base(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        # some families call their base model by position
        given = dict(zip(inspect.signature(module.forward).parameters, args, strict=False)) | kwargs
        ids = given.get("input_ids")
        encoded = given.get("mm_encoder_outputs") is not None
        if ids is None or not (self.session.adapter.has_images(given) or encoded):
            return None
        if self._expected is not None:
            images, inputs, clock = self._expected
        elif encoded:
            raise UnsupportedModeError(
                "mm_encoder_outputs was given, expected pixels on a patched model: features "
                "computed before cannot be scored"
            )
        else:
            inputs, clock = given, Clock(ids.device)
            clock.mark("start")
            images = self.session.images(given, ids)
        if self.session.keeps_all(images):
            everything = Selection.everything(images.lengths, images.parent, images.grids)
            self.session.note(images, everything, clock)
            return None
        self._pending = _Pending(images, inputs, clock)
        if self.session.method.site == "pixels":
            return (), self._without_pixels(given)
        if self._expected is None:
            self._recording.enter_context(self.session.signals.recording())
        return None

    def _without_pixels(self, given: dict[str, Any]) -> dict[str, Any]:
        """Text embeddings only: the small images' tokens are put in before the language model."""
        pending = self._pending
        embeds = self.session.adapter.model.get_input_embeddings()(given["input_ids"])
        nothing = embeds.new_zeros(*pending.images.columns.shape, 0)  # type: ignore[union-attr]
        pending.selection = self.session.decide(pending.images, nothing, pending.inputs)  # type: ignore[union-attr]
        pending.small = self.session.encode_small(pending.images, pending.selection, pending.inputs)  # type: ignore
        dropped = {*self.session.adapter.visual_inputs, "mm_encoder_outputs", "input_ids"}
        return {**{k: v for k, v in given.items() if k not in dropped}, "inputs_embeds": embeds}

    def _after_base(self, module: nn.Module, args: Any, output: Any) -> None:
        self._recording.close()
        pending, self._pending = self._pending, None
        if pending is not None and output is not None and pending.restore is None:
            raise NeverCompressedError(
                "images were given, but the language model was not run; expected the stock "
                f"forward of {type(module).__name__}"
            )

    def _before_language(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        pending = self._pending
        if pending is not None and pending.restore is None:
            return args, self._compressed(pending, kwargs)
        state = remembered(kwargs.get("past_key_values"))
        return None if state is None else (args, _later_step(state, kwargs))

    def _compressed(self, pending: _Pending, kwargs: dict[str, Any]) -> dict[str, Any]:
        pending.clock.mark("encoded")
        embeds, mask = kwargs["inputs_embeds"], kwargs.get("attention_mask")
        if mask is None:
            mask = torch.ones(embeds.shape[:2], dtype=torch.long, device=embeds.device)
        if not isinstance(mask, Tensor) or mask.dim() != 2:
            raise UnsupportedModeError(
                "the attention mask of this forward is not 2-D, expected [B, S] on a patched "
                "model: pass the processor's attention_mask and no prepared 4-D mask"
            )
        positions = kwargs.get("position_ids")
        if positions is None:
            positions = torch.arange(embeds.shape[1], device=embeds.device).expand(len(embeds), -1)
        if pending.selection is None:
            groups = gather_groups(pending.images, embeds)
            pending.selection = self.session.decide(pending.images, groups, pending.inputs)
        self.session.note(pending.images, pending.selection, pending.clock)
        short = self.session.shorten(
            pending.images, pending.selection, embeds, mask, positions, pending.small
        )
        pending.restore = short
        pending.clock.mark("selected")
        # the mask stays even if all ones: without it, gaps in position ids read as packed sequences
        return {
            **kwargs,
            "inputs_embeds": short.inputs_embeds,
            "attention_mask": short.attention_mask,
            "position_ids": short.position_ids,
        }

    def _after_language(
        self, module: nn.Module, args: Any, kwargs: dict[str, Any], output: Any
    ) -> Any:
        pending = self._pending
        if pending is None or pending.restore is None:
            return output
        short = pending.restore
        remember(getattr(output, "past_key_values", None), short)
        hidden = short.compaction.restore(output[0])
        if isinstance(output, tuple):
            return (hidden, *output[1:])
        output.last_hidden_state = hidden
        return output


def _later_step(state: CacheState, kwargs: dict[str, Any]) -> dict[str, Any]:
    """Inputs of a step behind a compressed prompt: the mask is respliced, positions continue."""
    cache, embeds, mask = (
        kwargs["past_key_values"],
        kwargs["inputs_embeds"],
        kwargs.get("attention_mask"),
    )
    batch, new = embeds.shape[:2]
    if batch != len(state.mask):
        raise UnsupportedModeError(
            f"a step of batch {batch} continues a compressed prompt of batch {len(state.mask)}, "
            "expected the same batch: use generate() for beams"
        )
    # negative when assisted decoding took back candidates that ran along with the prompt
    behind = int(cache.get_seq_length()) - state.mask.shape[1]
    start = state.mask[:, : state.mask.shape[1] + min(behind, 0)]
    later = max(behind, 0) + new
    wanted = state.prompt + behind + new
    if isinstance(mask, Tensor) and mask.dim() == 2 and mask.shape[1] == wanted:
        tail = mask[:, -later:]
    elif mask is None:
        tail = start.new_ones(batch, later)
    else:
        got = tuple(mask.shape) if isinstance(mask, Tensor) else type(mask).__name__
        raise UnsupportedModeError(
            f"attention_mask of this step is {got}, expected {(batch, wanted)}: the original "
            f"prompt's mask and ones for what came after it"
        )
    positions = kwargs.get("position_ids")
    if positions is None:
        positions = state.last + behind + 1 + torch.arange(new, device=embeds.device)
    else:
        positions = positions - state.shift
    return {
        **kwargs,
        "attention_mask": torch.cat([start, tail.to(start)], 1),
        "position_ids": positions,
    }
