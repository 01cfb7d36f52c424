"""The `generate` seam: compress once, then stock generate on full ids and short embeddings.

Decode steps are stock: beams, sampling, static caches and compiled decoding need nothing here, and
the returned sequences start with the user's full prompt.
"""

from __future__ import annotations

import copy
import inspect
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor

from vtc import dispatch
from vtc.errors import InputError, NeverCompressedError, UnsupportedModeError
from vtc.runtime.attributes import replaced
from vtc.runtime.cache import CacheState, filled, remember, remembered
from vtc.runtime.clock import Clock
from vtc.runtime.encoding import encode, stock_inputs
from vtc.runtime.forward import ForwardSeam
from vtc.runtime.images import Images
from vtc.runtime.session import Session
from vtc.runtime.short import Short, full_of, gather_groups
from vtc.runtime.turns import Turn, next_turn


class GenerateSeam:
    """What stands in for `model.generate` on a patched model.

    Args:
        session: the patched model's state.
        stock: the `generate` that was there.
        forward: the seam that serves the modes in which short embeddings cannot be handed over.
    """

    def __init__(self, session: Session, stock: Callable[..., Any], forward: ForwardSeam) -> None:
        self.session = session
        self.stock = stock
        self.forward = forward
        # signals and the last decision belong to one call at a time
        self._lock = threading.RLock()

    @torch.no_grad()
    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Same arguments and result as the stock `generate`."""
        kwargs = _by_keyword(self.stock, args, kwargs)
        session = self.session
        with self._lock, dispatch.using(session.kernels, session.ran):
            self.forward.clear()
            session.last = None
            config = _Config(session.adapter.model, kwargs)
            has_images = session.adapter.has_images(kwargs)
            _refuse(kwargs, config, has_images)
            cache = kwargs.get("past_key_values")
            state = remembered(cache)
            if state is not None and state.whole and not has_images:
                state = None
            if state is not None or (has_images and filled(cache)):
                return self._later_turn(state, kwargs, config)
            if not has_images:
                if not filled(cache):
                    session.check_text(kwargs)
                with self.forward.suspended():
                    return self._run(kwargs)
            clock = session.clock(kwargs)
            images = session.images(kwargs)
            session.begin()
            if session.keeps_all(images) and (config.assisted or not session.pads):
                session.note(images, None, clock)
                with self.forward.suspended():
                    return self._run(kwargs, self._whole(kwargs, config))
            if config.assisted:
                return self._assisted(images, kwargs, clock)
            mask = _attention_mask(kwargs, config)
            with self.forward.suspended():
                turn = Turn(kwargs, mask, self._positions(kwargs, mask), mask)
                _ = turn.unpadded  # read before the device has work
                return self._short(images, turn, kwargs, clock, config)

    def _whole(self, kwargs: Mapping[str, Any], config: _Config) -> CacheState | None:
        """What a cache is to remember of a prompt of which nothing is dropped; None where the
        caller's mask is not that of its tokens."""
        mask, ids = kwargs.get("attention_mask"), kwargs.get("input_ids")
        if ids is None or (mask is not None and getattr(mask, "shape", None) != ids.shape):
            return None
        mask = _attention_mask(kwargs, config)
        return Turn(kwargs, mask, self._positions(kwargs, mask), mask).state(None)

    def _positions(self, kwargs: Mapping[str, Any], mask: Tensor) -> Tensor:
        """Position ids of all tokens, as the stock generate numbers them."""
        given: Tensor | None = kwargs.get("position_ids")
        if given is not None:
            return given
        return self.session.adapter.model._prepare_position_ids_for_generation(  # type: ignore[no-any-return]
            kwargs["input_ids"], {**kwargs, "attention_mask": mask}
        )

    def _later_turn(self, state: CacheState | None, kwargs: dict[str, Any], config: _Config) -> Any:
        """Behind a cache: what it holds is not run again, and its images are not encoded again."""
        session = self.session
        if config.assisted:
            raise UnsupportedModeError(
                "assisted decoding was asked for behind a cache with a compressed prompt, expected "
                "plain decoding: pass the whole conversation without past_key_values"
            )
        session.begin()
        clock = session.clock(kwargs)
        turn = next_turn(session, state, kwargs, _attention_mask(kwargs, config))
        with self.forward.suspended():
            if turn.images is not None:
                return self._short(turn.images, turn, kwargs, clock, config)
            with _processors_see(session.adapter.model, kwargs["input_ids"], turn):
                given = _shortened(session, kwargs, turn.continued(None, session), config)
                return self._run(given, turn.state(None), used=False)

    def _short(
        self,
        images: Images,
        turn: Turn,
        kwargs: dict[str, Any],
        clock: Clock,
        config: _Config,
    ) -> Any:
        session, inputs = self.session, turn.inputs
        small, pixels = None, session.method.site == "pixels"
        if pixels:
            selection = session.decide_before(images, inputs)
        else:
            encoded = None
            if turn.past is None:
                encoded = encode(session, images, inputs, turn.mask, turn.position_ids, clock)
            if encoded is not None and encoded.short is not None:
                session.note(images, encoded.selection, clock)
                return self._prompted(images, turn, kwargs, clock, config, encoded.short)
            kept = (
                stock_inputs(session, images, inputs, clock) if encoded is None else encoded.kwargs
            )
            full = full_of(kept)
            known = turn.past is None
            session.prompt = (kept, turn.mask, turn.position_ids) if known else None
            selection = session.decide(images, gather_groups(images, full.embeds), inputs)
        session.note(images, selection, clock)
        left_alone = selection.is_identity and not session.acts_later and turn.past is None
        if left_alone and (pixels or not session.pads):
            session.checks.settle()
            return self._run(kwargs, turn.state(None))
        if pixels:
            full = session.embedded_only(inputs["input_ids"])
            small = session.encode_small(images, selection, inputs)
            clock.mark("encoded")
        short = session.shorten(images, selection, full, turn.mask, turn.position_ids, small)
        return self._prompted(images, turn, kwargs, clock, config, short)

    def _prompted(
        self,
        images: Images,
        turn: Turn,
        kwargs: dict[str, Any],
        clock: Clock,
        config: _Config,
        short: Short,
    ) -> Any:
        """The stock generate on a short prompt."""
        session, model = self.session, self.session.adapter.model
        clock.mark("selected")
        with _processors_see(model, kwargs["input_ids"], turn), session.deepstack(short):
            session.expect_layers(images, short)
            given = _shortened(session, kwargs, turn.continued(short, session), config)
            with self._captured(turn, given, config):
                out = self._run(given, turn.state(short), used=False)
        session.checks.settle()
        return out if session.fast is None else session.fast.handed_out(out)

    def _captured(
        self, turn: Turn, given: dict[str, Any], config: _Config
    ) -> AbstractContextManager[None]:
        """Within it, a stock generate of a short prompt is captured where it can be."""
        if (fast := self.session.fast) is None or turn.past is not None:
            return nullcontext()
        prompt = {n: given[n] for n in ("inputs_embeds", "attention_mask", "position_ids")}
        # what stock generate adds if it is told nothing
        more = given.get("max_new_tokens") or config["max_new_tokens"] or 20
        more = more if config.runs_prompt_once else None
        custom = given.get("custom_generate") is not None
        return fast.generating(turn.whole_mask.shape[1], prompt, more, custom)

    def _assisted(self, images: Images, kwargs: dict[str, Any], clock: Clock) -> Any:
        """Through the forward seam: stock assisted decoding cannot start from embeddings."""
        with self.forward.expecting(images, kwargs, clock):
            out = self._run(kwargs, forget=False)
        if self.session.last is None:
            raise NeverCompressedError(
                "generate() ended without compressing: the language model was never run on the "
                "images' prompt; call the model's own generate, not an unbound or custom one"
            )
        return out

    def _run(
        self,
        kwargs: dict[str, Any],
        state: CacheState | None = None,
        forget: bool = True,
        used: bool = True,
    ) -> Any:
        """The stock generate; notes the moment of the first logits and the size of the cache.

        Args:
            kwargs: its arguments.
            state: what the cache is to remember of its prompt.
            forget: whether it is to forget what it remembers, where there is no state.
            used: False where the first forward is to take short embeddings.

        Raises:
            NeverCompressedError: short embeddings were made and not used.
        """

        def after_prefill(module: Any, args: Any, given: dict[str, Any], output: Any) -> None:
            nonlocal used
            hook.remove()
            self.session.show_gaps()
            if not self.session.rows.lasts:
                # behind the prompt the model is stock, so that decoding can be compiled
                self.session.rows.detach()
            used |= given.get("inputs_embeds") is not None
            cache = getattr(output, "past_key_values", None)
            if state is not None or forget:
                remember(cache, state)
            if self.session.last is not None:
                self.session.last.clock.mark("first")
                self.session.note_cache(cache)

        hook = self.session.adapter.model.register_forward_hook(after_prefill, with_kwargs=True)
        if not used:
            self.session.hide_gaps()
        if self.session.lasts:
            kwargs = {"disable_compile": True, **kwargs}
        rows = self.session.rows
        rows_attached = rows.attached
        try:
            out = self.stock(**kwargs)
        finally:
            hook.remove()
            if rows_attached:
                rows.attach()
            self.session.show_gaps()
            self.session.clear_layers()
        if not used:
            raise NeverCompressedError(
                "generate() did not run the model on the compressed prompt, expected its first "
                "forward to take inputs_embeds: use a stock decoding mode, or a custom_generate "
                "that calls prepare_inputs_for_generation"
            )
        if (call := self.session.last) is not None:
            call.clock.mark("end")
            sequences = getattr(out, "sequences", out)
            if isinstance(sequences, Tensor):
                call.new_tokens = sequences.shape[1] - kwargs["input_ids"].shape[1]
        return out


class _Config:
    """Generation options of one call: keyword, else the given config, else the model's."""

    def __init__(self, model: Any, kwargs: Mapping[str, Any]) -> None:
        self.given = kwargs
        self.configs = [kwargs.get("generation_config"), model.generation_config]

    def __getitem__(self, name: str) -> Any:
        if self.given.get(name) is not None:
            return self.given[name]
        values = (getattr(config, name, None) for config in self.configs)
        return next((v for v in values if v is not None), None)

    @property
    def assisted(self) -> bool:
        """Whether stock generate will speculate; with beams it ignores what asks for it."""
        asked = ("prompt_lookup_num_tokens", "assistant_early_exit", "use_mtp")
        speculates = self.given.get("assistant_model") is not None or any(
            self[name] is not None and self[name] is not False for name in asked
        )
        return speculates and (self["num_beams"] or 1) == 1

    @property
    def runs_prompt_once(self) -> bool:
        """Whether generate will run the prompt as it is, on a cache of its own making."""
        return (
            (self["num_beams"] or 1) == (self["num_return_sequences"] or 1) == 1
            and self["cache_implementation"] is None
            and self["use_cache"] is not False
            and self.given.get("custom_generate") is None
            and not (self["output_attentions"] or self["output_hidden_states"])
        )


def _by_keyword(
    stock: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> dict[str, Any]:
    """All arguments by name, `inputs` as `input_ids`."""
    named = dict(kwargs)
    if args:
        signature = inspect.signature(stock)
        named = dict(signature.bind(*args, **kwargs).arguments)
        for name, parameter in signature.parameters.items():
            if parameter.kind is inspect.Parameter.VAR_KEYWORD:
                named |= named.pop(name, {})
    ids = named.pop("inputs", None)
    if ids is not None:
        if named.get("input_ids") is not None:
            raise InputError("generate() got both inputs and input_ids, expected one of them")
        named["input_ids"] = ids
    return named


def _refuse(kwargs: Mapping[str, Any], config: _Config, has_images: bool) -> None:
    """Raise for what would not be right on a patched model."""
    if kwargs.get("mm_encoder_outputs") is not None:
        raise UnsupportedModeError(
            "generate() got mm_encoder_outputs, expected pixels on a patched model: features "
            "computed before cannot be scored"
        )
    if not has_images:
        return
    if kwargs.get("inputs_embeds") is not None:
        raise UnsupportedModeError(
            "generate() got inputs_embeds beside pixel_values, expected input_ids alone on a "
            "patched model: pass the processor's input_ids"
        )
    if config["prefill_chunk_size"] is not None:
        raise UnsupportedModeError(
            "prefill_chunk_size was given, expected None with images on a patched model: "
            "stock chunking ignores short embeddings"
        )
    if "_vtc_handle" in getattr(kwargs.get("assistant_model"), "__dict__", {}):
        raise UnsupportedModeError(
            "assistant_model is patched itself, expected a stock model: call vtc.unpatch on it"
        )


def _attention_mask(kwargs: Mapping[str, Any], config: _Config) -> Tensor:
    """The 2-D mask that the stock generate would use."""
    ids: Tensor = kwargs["input_ids"]
    mask: Any = kwargs.get("attention_mask")
    if mask is None:
        pad, eos = config["pad_token_id"], config["eos_token_id"]
        ends = eos if isinstance(eos, list) else [eos]
        if pad is not None and pad not in ends and bool((ids == pad).any()):
            return torch.ne(ids, pad).long()
        return torch.ones_like(ids)
    if isinstance(mask, Tensor) and mask.shape == ids.shape:
        return mask
    got = tuple(mask.shape) if isinstance(mask, Tensor) else type(mask).__name__
    raise InputError(
        f"attention_mask is {got}, expected a tensor of the shape of input_ids {tuple(ids.shape)}: "
        "pass the processor's"
    )


def _shortened(
    session: Session, kwargs: dict[str, Any], given: dict[str, Tensor], config: _Config
) -> dict[str, Any]:
    """Arguments for the stock generate; lengths stay counted from the full prompt."""
    dropped = session.adapter.visual_inputs
    out = {k: v for k, v in kwargs.items() if k not in dropped}
    out |= given
    # the stock generate would subtract the short length from max_length and min_length
    length = kwargs["input_ids"].shape[1]
    for whole, new in (("max_length", "max_new_tokens"), ("min_length", "min_new_tokens")):
        limit = config[whole]
        if not limit or config[new] is not None:
            continue
        if whole == "max_length" and limit <= length:
            raise InputError(
                f"max_length={limit} leaves no room behind a prompt of {length} tokens, expected "
                "more than that: pass max_new_tokens"
            )
        out[new] = max(limit - length, 0)
        out.pop(whole, None)
        if getattr(out.get("generation_config"), whole, None) is not None:
            out["generation_config"] = copy.deepcopy(out["generation_config"])
            setattr(out["generation_config"], whole, None)
    return out


@contextmanager
def _processors_see(model: Any, ids: Tensor, turn: Turn) -> Iterator[None]:
    """Logits processors get the full prompt and its mask: stock penalties look at both."""
    stock, mask = model._get_logits_processor, turn.whole_mask

    def with_full_prompt(
        *args: Any, model_kwargs: dict[str, Any] | None = None, **kwargs: Any
    ) -> Any:
        seen = dict(model_kwargs or {})
        rows = len(seen["inputs_embeds"]) // len(mask)
        seen["attention_mask"] = None if turn.unpadded else mask.repeat_interleave(rows, 0)
        return stock(*args, **{**kwargs, "encoder_input_ids": ids, "model_kwargs": seen})

    with replaced(model, "_get_logits_processor", with_full_prompt):
        yield
