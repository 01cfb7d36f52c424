"""The `generate` seam: compress once, then stock generate on full ids and short embeddings.

Decode steps are stock: beams, sampling, static caches and compiled decoding need nothing here, and
the returned sequences start with the user's full prompt.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from vtc.errors import InputError, NeverCompressedError, UnsupportedModeError
from vtc.runtime.clock import Clock
from vtc.runtime.forward import ForwardSeam, remember, remembered
from vtc.runtime.images import Images
from vtc.runtime.session import Call, Session, Short, gather_groups
from vtc.types import Selection


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

    @torch.no_grad()
    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Same arguments and result as the stock `generate`."""
        kwargs = _by_keyword(self.stock, args, kwargs)
        config = _Config(self.session.adapter.model, kwargs)
        if remembered(kwargs.get("past_key_values")):
            raise UnsupportedModeError(
                "generate() got a cache that holds a compressed prompt, expected a fresh one: "
                "start each turn from the full conversation without past_key_values"
            )
        if kwargs.get("mm_encoder_outputs") is not None:
            raise UnsupportedModeError(
                "generate() got mm_encoder_outputs, expected pixels on a patched model: features "
                "computed before cannot be scored"
            )
        if not self.session.adapter.has_images(kwargs):
            with self.forward.suspended():
                return self.stock(**kwargs)
        if config["prefill_chunk_size"] is not None:
            raise UnsupportedModeError(
                "prefill_chunk_size was given, expected None with images on a patched model: "
                "stock chunking ignores short embeddings"
            )
        clock = Clock(kwargs["input_ids"].device)
        clock.mark("start")
        images = self.session.images(kwargs, kwargs["input_ids"])
        if self.session.keeps_all(images):
            return self._whole(images, kwargs, clock)
        if config.assisted:
            return self._assisted(images, kwargs, clock)
        return self._short(images, kwargs, clock, config)

    def _whole(self, images: Images, kwargs: dict[str, Any], clock: Clock) -> Any:
        everything = Selection.everything(images.lengths, images.parent, images.grids)
        call = self.session.note(images, everything, clock)
        with self.forward.suspended():
            return self._run(call, kwargs, None)

    def _short(self, images: Images, kwargs: dict[str, Any], clock: Clock, config: _Config) -> Any:
        mask = _attention_mask(kwargs, config)
        model = self.session.adapter.model
        positions = kwargs.get("position_ids")
        if positions is None:
            positions = model._prepare_position_ids_for_generation(
                kwargs["input_ids"], {**kwargs, "attention_mask": mask}
            )
        with self.forward.suspended():
            selection, embeds, small = self._choose(images, kwargs, clock)
            call = self.session.note(images, selection, clock)
            if selection.is_identity:
                return self._run(call, kwargs, None)
            short = self.session.shorten(images, selection, embeds, mask, positions, small)
            clock.mark("selected")
            with _processors_see(model, mask):
                return self._run(call, _shortened(self.session, kwargs, short, config), short)

    def _choose(
        self, images: Images, kwargs: dict[str, Any], clock: Clock
    ) -> tuple[Selection, Tensor, list[Tensor] | None]:
        """The decision, full embeddings, and each image's own tokens at the pixel site."""
        if self.session.method.site == "pixels":
            embeds = self.session.adapter.model.get_input_embeddings()(kwargs["input_ids"])
            nothing = embeds.new_zeros(*images.columns.shape, 0)
            selection = self.session.decide(images, nothing, kwargs)
            small = self.session.encode_small(images, selection, kwargs)
            clock.mark("encoded")
            return selection, embeds, small
        captured = self.session.capture(kwargs, clock)
        embeds = captured["inputs_embeds"]
        return self.session.decide(images, gather_groups(images, embeds), kwargs), embeds, None

    def _assisted(self, images: Images, kwargs: dict[str, Any], clock: Clock) -> Any:
        """Through the forward seam: stock assisted decoding cannot start from embeddings."""
        self.session.last = None
        with self.forward.expecting(images, kwargs, clock):
            out = self.stock(**kwargs)
        if self.session.last is None:
            raise NeverCompressedError(
                "generate() ended without compressing: the language model was never run on the "
                "images' prompt; call the model's own generate, not an unbound or custom one"
            )
        return out

    def _run(self, call: Call, kwargs: dict[str, Any], short: Short | None) -> Any:
        """The stock generate; notes the moment of the first logits and the size of the cache."""
        length = kwargs["input_ids"].shape[1]

        def after_prefill(module: Any, args: Any, output: Any) -> None:
            hook.remove()
            call.clock.mark("first")
            cache = getattr(output, "past_key_values", None)
            call.kv_bytes = _kv_bytes(cache)
            if short is not None:
                remember(cache, short)

        hook = self.session.adapter.model.register_forward_hook(after_prefill)
        try:
            out = self.stock(**kwargs)
        finally:
            hook.remove()
        call.clock.mark("end")
        sequences = out if isinstance(out, Tensor) else out.sequences
        call.new_tokens = sequences.shape[1] - length
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
        return self.given.get("assistant_model") is not None or bool(
            self["prompt_lookup_num_tokens"]
        )


def _by_keyword(
    stock: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> dict[str, Any]:
    """All arguments by name, `inputs` as `input_ids`."""
    named = dict(zip(inspect.signature(stock).parameters, args, strict=False)) | kwargs
    ids = named.pop("inputs", None)
    if ids is not None:
        if named.get("input_ids") is not None:
            raise InputError("generate() got both inputs and input_ids, expected one of them")
        named["input_ids"] = ids
    if named.get("pixel_values") is not None and not isinstance(named.get("input_ids"), Tensor):
        got = type(named.get("input_ids")).__name__
        raise InputError(
            f"generate() got pixel_values and input_ids of type {got}, expected a tensor [B, S]"
        )
    return named


def _attention_mask(kwargs: Mapping[str, Any], config: _Config) -> Tensor:
    """The 2-D mask that the stock generate would use."""
    ids: Tensor = kwargs["input_ids"]
    mask: Tensor | None = kwargs.get("attention_mask")
    if mask is None:
        pad, eos = config["pad_token_id"], config["eos_token_id"]
        ends = eos if isinstance(eos, list) else [eos]
        if pad is not None and pad not in ends and bool((ids == pad).any()):
            return (ids != pad).long()
        return torch.ones_like(ids)
    if mask.shape != ids.shape:
        raise UnsupportedModeError(
            f"attention_mask has shape {tuple(mask.shape)}, expected that of input_ids "
            f"{tuple(ids.shape)}"
        )
    return mask


def _shortened(
    session: Session, kwargs: dict[str, Any], short: Short, config: _Config
) -> dict[str, Any]:
    """Arguments for the stock generate; lengths stay counted from the full prompt."""
    dropped = session.adapter.visual_inputs
    out = {k: v for k, v in kwargs.items() if k not in dropped}
    out |= {
        "inputs_embeds": short.inputs_embeds,
        "attention_mask": short.attention_mask,
        "position_ids": short.position_ids,
    }
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
def _processors_see(model: Any, mask: Tensor) -> Iterator[None]:
    """Logits processors get the full mask: stock penalties find padding in the full ids by it."""
    stock = model._get_logits_processor

    def with_full_mask(
        *args: Any, model_kwargs: dict[str, Any] | None = None, **kwargs: Any
    ) -> Any:
        seen = dict(model_kwargs or {})
        rows = len(seen["inputs_embeds"]) // len(mask)
        whole = bool((mask == 1).all())
        seen["attention_mask"] = None if whole else mask.repeat_interleave(rows, 0)
        return stock(*args, model_kwargs=seen, **kwargs)

    vars(model)["_get_logits_processor"] = with_full_mask
    try:
        yield
    finally:
        del vars(model)["_get_logits_processor"]


def _kv_bytes(cache: Any) -> int | None:
    """Bytes of keys and values in a cache."""
    parts = [
        getattr(layer, name, None)
        for layer in getattr(cache, "layers", [])
        for name in ("keys", "values")
    ]
    found = [part.nbytes for part in parts if isinstance(part, Tensor)]
    return sum(found) if found else None
