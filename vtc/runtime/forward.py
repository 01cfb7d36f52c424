"""The `forward` seam: short inputs for the language model, full-length results for its caller.

Serves direct calls (labels, scoring, own decoding loops) and assisted decoding. What later steps
need to know travels on the cache object, so that it lives exactly as long as the cache does.
"""

from __future__ import annotations

import inspect
import threading
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from vtc import dispatch
from vtc.errors import InputError, NeverCompressedError, PatchError, UnsupportedModeError
from vtc.runtime.cache import CacheState, compressed, filled, remember
from vtc.runtime.clock import Clock
from vtc.runtime.encoding import encode
from vtc.runtime.images import Images
from vtc.runtime.session import Session
from vtc.runtime.short import Short, full_of, gather_groups
from vtc.types import Selection


@dataclass
class _Pending:
    """A forward with images that is under way."""

    images: Images
    inputs: Mapping[str, Any]
    clock: Clock
    whole: bool
    fast: bool = False
    encoded: bool = False
    reached: bool = False
    small: list[Tensor] | None = None
    selection: Selection | None = None
    short: Short | None = None


class ForwardSeam:
    """Hooks on the base model and its language model; one forward of a model at a time.

    Args:
        session: the patched model's state.
    """

    def __init__(self, session: Session) -> None:
        self.session = session
        self._lock = threading.Lock()
        self._attached = False  # what is wanted; within `suspended` there are no hooks all the same
        self._suspensions = 0
        self._hooks: list[Any] = []
        self._pending: _Pending | None = None
        self._expected: tuple[Images, Mapping[str, Any], Clock] | None = None
        self._recording = ExitStack()

    def __reduce_ex__(self, protocol: Any) -> Any:
        raise PatchError(
            "a patched model was to be copied or pickled, expected an unpatched one: the copy "
            "would share the patch; call vtc.unpatch(model) first"
        )

    def attach(self) -> None:
        """Register the hooks."""
        with self._lock:
            self._attached = True
            self._settle()

    def detach(self) -> None:
        """Remove the hooks and everything a broken-off call left, for good."""
        with self._lock:
            self._attached = False
            self._settle()
        self.clear()

    @contextmanager
    def suspended(self) -> Iterator[None]:
        """Within it the model is stock, so that compiled decoding has nothing to trace."""
        with self._lock:
            self._suspensions += 1
            self._settle()
        try:
            yield
        finally:
            with self._lock:
                self._suspensions -= 1
                self._settle()

    def _settle(self) -> None:
        """Make the hooks be there, or not; a patch may be removed while a generate is running."""
        wanted = self._attached and not self._suspensions
        while self._hooks and not wanted:
            self._hooks.pop().remove()
        if wanted and not self._hooks:
            base, language_model = self.session.adapter.base, self.session.adapter.language_model
            self._hooks = [
                base.register_forward_pre_hook(self._before_base, with_kwargs=True),
                base.register_forward_hook(self._after_base, always_call=True),
                # before the seam between its layers, which looks at the short sequence
                language_model.register_forward_pre_hook(
                    self._before_language, with_kwargs=True, prepend=True
                ),
                language_model.register_forward_hook(self._after_language),
            ]

    def clear(self) -> None:
        """Forget a forward that was broken off: an interrupt runs no hook behind it."""
        self._recording.close()
        self.session.show_gaps()
        self._pending = None

    @property
    def serving(self) -> bool:
        """Whether a generate is under way that needs these hooks for every token."""
        return self._expected is not None

    @contextmanager
    def expecting(self, images: Images, inputs: Mapping[str, Any], clock: Clock) -> Iterator[None]:
        """Within it a stock generate runs on these images; the tower may run before the base."""
        self._expected = (images, inputs, clock)
        with self.session.recording(images, inputs):
            try:
                yield
            finally:
                self._expected = None

    # what the host remembers, by layout for one, would be traced instead of looked up
    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def _before_base(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        if getattr(module, "_is_replica", False):
            raise UnsupportedModeError(
                "a replica of a patched model was run, expected the model itself: DataParallel "
                "would have its copies share one patch; use one process for each device"
            )
        self.clear()
        given = kwargs
        if args:  # some families call their base model by position
            given = dict(zip(inspect.signature(module.forward).parameters, args)) | kwargs  # noqa: B905
        encoded = _holds_features(given.get("mm_encoder_outputs"))
        if not (encoded or self.session.adapter.has_images(given)):
            if self._expected is None and not filled(given.get("past_key_values")):
                self.session.last = None
                self.session.check_text(given)
            return self._positioned(given)
        if filled(given.get("past_key_values")):
            raise UnsupportedModeError(
                "images came with a cache that is not empty, expected none in a forward of a "
                "patched model: pass the whole conversation without past_key_values; generate() "
                "takes images behind a cache"
            )
        images, inputs, clock = self._expected or self._arrived(given, encoded)
        session = self.session
        self._recording.enter_context(dispatch.using(session.kernels, session.ran))
        session.begin()
        fast = self._expected is None and session.pads
        pending = _Pending(images, inputs, clock, session.keeps_all(images) and not fast, fast)
        self._pending = pending
        if pending.whole:
            return None
        if fast and session.fast is not None:
            self._recording.enter_context(session.fast.forwarding())
        if session.method.site == "pixels":
            return self._before_encoder(pending, given)
        if self._expected is None and (fed := self._captured(pending, given)) is not None:
            return fed
        if self._expected is None:
            self._recording.enter_context(self.session.recording(images, inputs))
        return None

    def _positioned(
        self, given: Mapping[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        """Position ids of a step without any, where the stock model would count by its cache."""
        state = compressed(given.get("past_key_values"))
        if state is None or state.shift.dim() == 2 or given.get("position_ids") is not None:
            return None
        new: Any = given.get("input_ids")
        new = given["inputs_embeds"] if new is None else new
        behind = filled(given["past_key_values"]) - state.mask.shape[1]
        start = state.following + behind + torch.arange(new.shape[1], device=new.device)
        # what comes next takes the shift off again
        return (), {**given, "position_ids": start + state.shift}

    def _arrived(
        self, given: Mapping[str, Any], encoded: bool
    ) -> tuple[Images, Mapping[str, Any], Clock]:
        """The images of a direct call."""
        self.session.last = None
        if encoded:
            raise UnsupportedModeError(
                "mm_encoder_outputs reached a patched model, expected pixels: features computed "
                "before cannot be scored; call the model's own generate (not one taken before the "
                "patch or of its class) with pixel_values"
            )
        clock = self.session.clock(given)
        return self.session.images(given), given, clock

    def _before_encoder(
        self, pending: _Pending, given: Mapping[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        """Text embeddings only: the small images' tokens are put in before the language model."""
        session, images, inputs = self.session, pending.images, pending.inputs
        pending.selection = selection = session.decide_before(images, inputs)
        pending.whole = selection.is_identity
        if pending.whole:
            return None
        pending.small = session.encode_small(images, selection, inputs)
        embeds = given.get("inputs_embeds")
        return self._fed(given, session.embedded(given["input_ids"]) if embeds is None else embeds)

    def _captured(
        self, pending: _Pending, given: Mapping[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        """What a captured encoder makes of a call; None where the stock model has to encode."""
        session, ids, mask = self.session, given.get("input_ids"), given.get("attention_mask")
        if session.fast is None or ids is None or given.get("inputs_embeds") is not None:
            return None
        if mask is None:
            mask = torch.ones_like(ids)
        if not isinstance(mask, Tensor) or mask.shape != ids.shape:
            return None  # refused once the language model is reached
        positions = given.get("position_ids")
        if positions is None:
            positions = session.adapter.position_ids(given)
        if positions is None:
            positions = torch.arange(ids.shape[1], device=ids.device)[None]
        encoded = encode(session, pending.images, pending.inputs, mask, positions, pending.clock)
        if encoded is None:
            return None
        pending.encoded = True
        if encoded.short is None:
            return self._fed({**given, "position_ids": positions}, encoded.kwargs["inputs_embeds"])
        pending.selection, pending.short = encoded.selection, encoded.short
        fed = self._fed({**given, "position_ids": positions}, encoded.short.inputs_embeds)[1]
        return (), fed | _inputs(encoded.short)

    def _fed(
        self, given: Mapping[str, Any], embeds: Tensor
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """The base model's inputs with embeddings in the place of ids and pixels."""
        session = self.session
        dropped = {*session.adapter.visual_inputs, "mm_encoder_outputs", "input_ids"}
        kept = {name: value for name, value in given.items() if name not in dropped}
        if given.get("position_ids") is None:
            # without pixels the stock model can no longer tell where they were
            kept["position_ids"] = session.adapter.position_ids(given)
        return (), {**kept, "inputs_embeds": embeds}

    def _after_base(self, module: nn.Module, args: Any, output: Any) -> None:
        pending = self._pending
        self.clear()
        if pending is None or output is None:
            return
        self.session.checks.settle()
        if not pending.reached:
            raise NeverCompressedError(
                "images were given, but the language model was not run; expected the stock "
                f"forward of {type(module).__name__}"
            )
        if self._expected is None:
            pending.clock.mark("first")

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def _before_language(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        pending = self._pending
        if pending is not None and not pending.reached:
            pending.reached = True
            if pending.whole:
                self.session.note(pending.images, pending.selection, pending.clock)
                return None
            if pending.short is not None:
                self.session.note(pending.images, pending.selection, pending.clock)
                pending.clock.mark("selected")
                self.session.expect_layers(pending.images, pending.short)
                self.session.hide_gaps()
                return None
            short = self._compressed(pending, kwargs)
            return None if short is None else (args, {**kwargs, **short})
        state = compressed(kwargs.get("past_key_values"))
        return None if state is None else (args, _later_step(state, kwargs))

    def _compressed(self, pending: _Pending, kwargs: Mapping[str, Any]) -> dict[str, Any] | None:
        """The short inputs, or None where the method kept everything."""
        if not pending.encoded:
            pending.clock.mark("encoded")
        embeds = kwargs["inputs_embeds"]
        batch, length = embeds.shape[:2]
        mask, positions = kwargs.get("attention_mask"), kwargs.get("position_ids")
        if mask is None:
            mask = torch.ones(batch, length, dtype=torch.long, device=embeds.device)
        if not isinstance(mask, Tensor) or mask.shape != (batch, length):
            got = tuple(mask.shape) if isinstance(mask, Tensor) else type(mask).__name__
            raise UnsupportedModeError(
                f"the attention mask of this forward is {got}, expected {(batch, length)} on a "
                "patched model: pass the processor's attention_mask and no prepared 4-D mask"
            )
        if positions is None:
            positions = torch.arange(length, device=embeds.device)[None]
        selection = pending.selection
        if selection is None:
            groups = gather_groups(pending.images, embeds)
            self.session.prompt = (dict(kwargs), mask, positions)
            selection = self.session.decide(pending.images, groups, pending.inputs)
        self.session.note(pending.images, selection, pending.clock)
        if selection.is_identity and not (self.session.acts_later or pending.fast):
            return None
        short = self.session.shorten(
            pending.images, selection, full_of(kwargs), mask, positions, pending.small
        )
        pending.clock.mark("selected")
        self.session.expect_layers(pending.images, short)
        self.session.hide_gaps()
        pending.short = short
        return {**_inputs(short), **short.deepstack()}

    def _after_language(self, module: nn.Module, args: Any, output: Any) -> Any:
        pending = self._pending
        if pending is None:
            return output
        cache = getattr(output, "past_key_values", None)
        self.session.note_cache(cache)
        short = pending.short
        remember(cache, None if short is None else _state(short))
        if short is None:
            return output
        hidden = short.compaction.restore(output[0])
        if isinstance(output, tuple):
            return (hidden, *output[1:])
        output.last_hidden_state = hidden
        if getattr(output, "hidden_states", None) is not None:
            output.hidden_states = tuple(map(short.compaction.restore, output.hidden_states))
        return output


def _inputs(short: Short) -> dict[str, Any]:
    """Inputs of the language model, but for DeepStack."""
    # the mask stays even if all ones: without it, gaps in position ids read as packed sequences
    return {
        "inputs_embeds": short.inputs_embeds,
        "attention_mask": short.attention_mask,
        "position_ids": short.position_ids,
    }


def _state(short: Short) -> CacheState:
    return CacheState(short.compaction.length, short.attention_mask, short.shift, short.following)


def _holds_features(encoded: Any) -> bool:
    """Whether encoder outputs are among the inputs; stock generate hands on an empty dict."""
    return bool(encoded) and any(output is not None for output in encoded.values())


def _later_step(state: CacheState, kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """Inputs of a step behind a compressed prompt: the mask is respliced, positions continue."""
    embeds = kwargs["inputs_embeds"]
    mask, positions = kwargs.get("attention_mask"), kwargs.get("position_ids")
    batch, new = embeds.shape[:2]
    if batch != len(state.mask):
        raise UnsupportedModeError(
            f"a step of batch {batch} continues a compressed prompt of batch {len(state.mask)}, "
            "expected the same batch: use generate() for beams"
        )
    # negative when assisted decoding took back candidates that ran along with the prompt
    behind = filled(kwargs["past_key_values"]) - state.mask.shape[1]
    start = state.mask[:, : state.mask.shape[1] + min(behind, 0)]
    later = max(behind, 0) + new
    wanted = state.prompt + behind + new
    if mask is None:
        tail = start.new_ones(batch, later)
    elif isinstance(mask, Tensor) and mask.shape == (batch, wanted):
        tail = mask[:, -later:]
    else:
        got = tuple(mask.shape) if isinstance(mask, Tensor) else type(mask).__name__
        raise InputError(
            f"attention_mask of this step is {got}, expected {(batch, wanted)}: the original "
            f"prompt's mask and ones for what came after it"
        )
    if positions is None:
        # as the stock model counts them: by what it would have in its cache
        positions = torch.arange(wanted - new, wanted, device=embeds.device)[None]
    return {
        **kwargs,
        "attention_mask": torch.cat([start, tail.to(start)], 1),
        "position_ids": positions - state.shift,
    }
