"""Prefill and decode step of a patched model's language model as captured calls.

Prompts are padded on the left to a bucket, keys and values stand in a cache of fixed capacity, so
that one captured call serves every prompt of its bucket and every decode step of its cache.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor
from transformers.modeling_outputs import BaseModelOutputWithPast

from vtc.adapters.base import Adapter
from vtc.runtime.compiling import compiled_layers
from vtc.runtime.graphs import CaptureError, Graphs
from vtc.runtime.static_cache import CountedCache

_CACHES = 4
_KIND = "language model"
# what a language model may be told besides its tensors
_PLAIN = (bool, int, float, str, type(None))


def bucket(length: int) -> int:
    """The next length that prompts are padded to: a multiple of 32, beyond 256 of 64, beyond 1024
    of 128."""
    step = 32 if length <= 256 else 64 if length <= 1024 else 128
    return -(-length // step) * step


def capacity(length: int) -> int:
    """The next capacity of a cache: a multiple of 256, beyond 4096 of 1024."""
    step = 256 if length <= 4096 else 1024
    return -(-length // step) * step


class FastLanguageModel:
    """Stands in for the language model's forward while a call is served.

    Args:
        adapter: describes the model.
        graphs: holds what is captured.
        compiles: whether decoder layers are compiled before they are captured.

    Attributes:
        told: what was done with the prefill and decode steps of the call under way.
    """

    def __init__(self, adapter: Adapter, graphs: Graphs, compiles: bool = False) -> None:
        self.model: Any = adapter.language_model
        self.graphs, self.compiles = graphs, compiles
        self.told: dict[str, str] = {}
        self._caches: OrderedDict[tuple[int, int], CountedCache] = OrderedDict()
        self._busy: CountedCache | None = None

    def refusal(self) -> str | None:
        """Why nothing of this language model can be captured; None if it can."""
        kind = self.model.config._attn_implementation
        if kind not in ("sdpa", "eager"):
            return f"attention is {kind!r}, which looks at masks on the host; load it with sdpa"
        if not CountedCache.fits(self.model.config):
            return "some of its layers attend within a sliding window"
        return None

    def clear(self) -> None:
        """Drop the caches."""
        self._caches.clear()

    @property
    def held_bytes(self) -> int:
        """Memory of the caches."""
        return sum(cache.held_bytes() for cache in self._caches.values())

    def cache(self, batch: int, length: int) -> CountedCache:
        """An empty cache for so many rows of at least this length."""
        size = (batch, capacity(length))
        found = self._caches.get(size)
        if found is None:
            while len(self._caches) >= _CACHES:
                gone, _ = self._caches.popitem(last=False)
                self.graphs.drop(partial(_of_cache, gone))
            device = next(self.model.parameters()).device
            # what one call makes under inference_mode, another could not write to
            with torch.inference_mode(False):
                found = CountedCache(self.model.config, size[1], device)
            self._caches[size] = found
        self._caches.move_to_end(size)
        found.count(0)
        found.clean()
        return found

    @contextmanager
    def serving(self) -> Iterator[None]:
        """Within it, this thread's runs of the language model are captured where they can be."""
        stock, owner = self.model.forward, threading.get_ident()

        def forward(*args: Any, **kwargs: Any) -> Any:
            if threading.get_ident() != owner or args:
                return stock(*args, **kwargs)
            return self._forward(stock, kwargs)

        self.told = {}
        had = "forward" in vars(self.model)
        self.model.forward = forward
        try:
            yield
        finally:
            if had:
                self.model.forward = stock
            else:
                del self.model.forward

    def _forward(self, stock: Callable[..., Any], kwargs: dict[str, Any]) -> Any:
        given: Any = kwargs.get("past_key_values")
        embeds = kwargs.get("inputs_embeds")
        if not isinstance(embeds, Tensor) or kwargs.get("input_ids") is not None:
            return stock(**kwargs)
        first = given is None or (isinstance(given, CountedCache) and given.filled == 0)
        step = "prefill" if first else "decode"
        reason = self._odd(kwargs, embeds, given)
        if reason is None:
            try:
                return self._captured(stock, kwargs, embeds, given)
            except CaptureError as error:
                reason = str(error)
        self.told[step] = reason
        return stock(**kwargs)

    def _odd(self, kwargs: Mapping[str, Any], embeds: Tensor, given: Any) -> str | None:
        """Why this run is left to the stock model."""
        if not (given is None or isinstance(given, CountedCache)):
            return f"its cache is a {type(given).__name__} of the caller's"
        if isinstance(given, CountedCache) and given.filled and embeds.shape[1] != 1:
            return "several tokens came behind a cache"
        if torch.is_grad_enabled() and (
            embeds.requires_grad or any(p.requires_grad for p in self.model.parameters())
        ):
            return "gradients are wanted; run it under torch.no_grad()"
        mask = kwargs.get("attention_mask")
        if mask is not None and not (isinstance(mask, Tensor) and mask.dim() == 2):
            return "its attention mask was prepared before"
        known = ("inputs_embeds", "attention_mask", "position_ids", "past_key_values")
        for name, value in kwargs.items():
            if name not in known and not isinstance(value, _PLAIN):
                return f"it is given {name}"
        if kwargs.get("output_hidden_states") or kwargs.get("output_attentions"):
            return "hidden states or attentions are wanted"
        return None

    def _captured(
        self, stock: Callable[..., Any], kwargs: dict[str, Any], embeds: Tensor, given: Any
    ) -> Any:
        batch, length, _ = embeds.shape
        use_cache = kwargs.get("use_cache")
        use_cache = self.model.config.use_cache if use_cache is None else use_cache
        cache: CountedCache | None = given
        if cache is None and use_cache:
            cache = self.cache(batch, length)
        start = 0 if cache is None else cache.filled
        size = None if cache is None else (batch, cache.capacity)
        mask, positions = kwargs.get("attention_mask"), kwargs.get("position_ids")
        if mask is None:
            mask = torch.ones(batch, start + length, dtype=torch.long, device=embeds.device)
        if positions is None:
            positions = torch.arange(start, start + length, device=embeds.device)[None]
        other = {
            name: value
            for name, value in kwargs.items()
            if name not in ("inputs_embeds", "attention_mask", "position_ids", "past_key_values")
        }
        width = length if cache is None else cache.capacity
        key = (
            _KIND,
            size,
            tuple(embeds.shape),
            embeds.dtype,
            tuple(positions.shape),
            mask.dtype,
            tuple(sorted(other.items())),
            self.model.config._attn_implementation,
        )
        if not self.graphs.holds(key):
            # a buffer of the cache's length, whatever is filled of it now
            mask = torch.nn.functional.pad(mask, (0, width - mask.shape[-1]))

        def run(embeds: Tensor, mask: Tensor, positions: Tensor) -> Tensor:
            with ExitStack() as stack:
                place = torch.arange(length, device=embeds.device)
                if cache is not None:
                    place = stack.enter_context(cache.placing(length))
                    # the first run makes the cache's memory, which the compiler takes as it is
                if self.compiles and (cache is None or cache.is_initialized):
                    stack.enter_context(compiled_layers(self.model.layers, cache))
                out = stock(
                    inputs_embeds=embeds,
                    attention_mask=_visible(embeds, mask, place),
                    position_ids=positions,
                    past_key_values=cache,
                    **{**other, "use_cache": cache is not None},
                )
                return out[0]  # type: ignore[no-any-return]

        if cache is not None:
            cache.start.fill_(start)
        hidden = self.graphs.run(key, run, [embeds, mask, positions])
        if cache is not None:
            cache.count(start + length)
        self.told["decode" if start else "prefill"] = self.graphs.backend
        kept: Any = cache
        if given is None and cache is not None:
            kept = cache.snapshot()
        return BaseModelOutputWithPast(last_hidden_state=hidden, past_key_values=kept)


def _visible(embeds: Tensor, mask: Tensor, place: Tensor) -> Tensor:
    """What each entry attends to, as numbers to be added, `[B, 1, L, entries]`: once, instead of in
    each layer."""
    entry = torch.arange(mask.shape[-1], device=embeds.device)
    seen = (entry <= place[:, None]) & (mask[:, None] != 0)  # [B, L, entries]
    lowest = torch.finfo(embeds.dtype).min
    return torch.zeros_like(seen, dtype=embeds.dtype).masked_fill(~seen, lowest)[:, None]


def _of_cache(size: tuple[int, int], key: Any) -> bool:
    """Whether a captured call works on the cache of this size."""
    return isinstance(key, tuple) and key[:2] == (_KIND, size)
