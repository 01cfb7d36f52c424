"""Prefill and decode step of a patched model's language model as captured calls.

Prompts are padded on the left to a bucket, keys and values stand in a cache of fixed capacity, so
that one captured call serves every prompt of its bucket and every decode step of its cache.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers.modeling_outputs import BaseModelOutputWithPast

from vtc.adapters.base import Adapter
from vtc.checks import require_none
from vtc.runtime.attributes import replaced
from vtc.runtime.captured_run import visible
from vtc.runtime.compiling import compiled_layers
from vtc.runtime.graphs import CaptureError, Graphs
from vtc.runtime.static_cache import CountedCache

_CACHES = 4
_KIND = "language model"
# what a language model may be told; anything else has to be nothing
_KNOWN = (
    "inputs_embeds",
    "attention_mask",
    "position_ids",
    "past_key_values",
    "use_cache",
    "return_dict",
    "logits_to_keep",  # of the head, which comes behind
)


def bucket(length: int) -> int:
    """The next length that prompts are padded to: a multiple of 32, beyond 512 of 64, beyond 1024
    of 128."""
    step = 32 if length <= 512 else 64 if length <= 1024 else 128
    return -(-length // step) * step


def capacity(length: int) -> int:
    """The next capacity of a cache: a multiple of 256, beyond 4096 of 1024."""
    step = 256 if length <= 4096 else 1024
    return -(-length // step) * step


@dataclass(frozen=True)
class _Inputs:
    """What one run of a language model is given.

    Attributes:
        embeds: `[B, L, D]`.
        mask: `[B, n]` over the entries that there are then.
        positions: `[(P,) B, L]`.
    """

    embeds: Tensor
    mask: Tensor
    positions: Tensor

    @property
    def shapes(self) -> tuple[Any, ...]:
        """What decides about a capture, but for the mask, which grows."""
        return tuple(self.embeds.shape), self.embeds.dtype, tuple(self.positions.shape)

    def differ(self, other: _Inputs) -> Tensor:
        """Whether numbers are not the same, on the device."""
        parts = zip(
            (self.embeds, self.mask, self.positions),
            (other.embeds, other.mask, other.positions),
            strict=True,
        )
        # what is not a number in both is the same
        return torch.stack([((a != b) & ((a == a) | (b == b))).any() for a, b in parts]).any()


class FastLanguageModel:
    """Stands in for the language model's forward while a call is served.

    Args:
        adapter: describes the model.
        graphs: holds what is captured.
        compiles: whether decoder layers are compiled before they are captured.

    Attributes:
        told: what was done with the prefill and decode steps of the call under way.
        refused: why the call under way is left to the stock model, if it is.
    """

    def __init__(self, adapter: Adapter, graphs: Graphs, compiles: bool = False) -> None:
        self.model: Any = adapter.language_model
        self.graphs, self.compiles = graphs, compiles
        self.told: dict[str, str] = {}
        self.refused: str | None = None
        self._caches: OrderedDict[tuple[int, int], CountedCache] = OrderedDict()
        self._ahead: tuple[CountedCache, _Inputs, Tensor] | None = None

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
        self._ahead = None

    @property
    def held_bytes(self) -> int:
        """Memory of the caches."""
        return sum(cache.held_bytes() for cache in self._caches.values())

    def cache(self, batch: int, length: int) -> CountedCache:
        """An empty cache for so many rows of at least this length; the one that holds what was run
        ahead, if it is for the same."""
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
        if self._ahead is None or self._ahead[0] is not found:
            found.count(0)
            found.clean()
        return found

    def run_ahead(self, length: int, **given: Tensor) -> None:
        """Start the prefill of a prompt before generate gets to it: the device works meanwhile.

        Args:
            length: entries that the cache will have to hold.
            **given: of generate.
        """
        inputs = _Inputs(given["inputs_embeds"], given["attention_mask"], given["position_ids"])
        self._ahead = None
        cache = self.cache(len(inputs.embeds), length)
        try:
            hidden = self._captured(self.model.forward, inputs, cache)
        except CaptureError:
            return  # generate will run it, and say why
        cache.count(0)
        self._ahead = cache, inputs, hidden

    @contextmanager
    def serving(self, generates: bool) -> Iterator[None]:
        """Within it, this thread's runs of the language model are captured where they can be.

        A generate has its cache: runs without one within it are somebody else's (guidance, a
        logits processor) and are left alone.
        """
        stock, owner = self.model.forward, threading.get_ident()

        def forward(*args: Any, **kwargs: Any) -> Any:
            foreign = generates and kwargs.get("past_key_values") is None
            if threading.get_ident() != owner or args or foreign:
                return stock(*args, **kwargs)
            return self._forward(stock, kwargs)

        self.told, self.refused = {}, None
        try:
            with replaced(self.model, "forward", forward):
                yield
        finally:
            self._ahead = None

    def _forward(self, stock: Callable[..., Any], kwargs: dict[str, Any]) -> Any:
        given: Any = kwargs.get("past_key_values")
        embeds = kwargs.get("inputs_embeds")
        if not isinstance(embeds, Tensor) or kwargs.get("input_ids") is not None:
            return stock(**kwargs)
        if self.refused is not None:
            self.told = dict.fromkeys(("prefill", "decode"), self.refused)
            return stock(**kwargs)
        behind = given.filled if isinstance(given, CountedCache) else 0
        step = "decode" if behind or (given is not None and embeds.shape[1] == 1) else "prefill"
        reason = self._odd(kwargs, embeds, given)
        if reason is None:
            wanted = kwargs.get("use_cache")
            cache: CountedCache | None = given
            if cache is None and (self.model.config.use_cache if wanted is None else wanted):
                cache = self.cache(len(embeds), embeds.shape[1])
            inputs = _inputs(kwargs, embeds, behind)
            try:
                hidden = self._taken(inputs, cache)
                if hidden is None:
                    hidden = self._captured(stock, inputs, cache)
                self.told[step] = self.graphs.backend
                kept: Any = cache.snapshot() if cache is not None and given is None else cache
                return BaseModelOutputWithPast(last_hidden_state=hidden, past_key_values=kept)
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
        mask = kwargs.get("attention_mask")
        if mask is not None and not (isinstance(mask, Tensor) and mask.dim() == 2):
            return "its attention mask was prepared before"
        config = self.model.config
        if config.output_hidden_states or config.output_attentions:
            return "hidden states or attentions are wanted by the config"
        if not kwargs.get("return_dict", config.return_dict):
            return "a tuple is wanted"
        for name, value in kwargs.items():
            if name not in _KNOWN and value is not None and value is not False:
                return f"it is given {name}"
        return None

    def _taken(self, inputs: _Inputs, cache: CountedCache | None) -> Tensor | None:
        """The hidden states of what was run ahead, if it is this; it is checked later that the
        numbers are the same."""
        if self._ahead is None or cache is not self._ahead[0] or cache.filled:
            return None
        _, before, hidden = self._ahead
        self._ahead = None
        if before.shapes != inputs.shapes or before.mask.shape != inputs.mask.shape:
            return None
        require_none(
            inputs.differ(before),
            "generate changed the compressed prompt before its first forward, expected it as it "
            "was given: patch with fast=False",
        )
        cache.count(inputs.embeds.shape[1])
        return hidden

    def _captured(
        self, stock: Callable[..., Any], inputs: _Inputs, cache: CountedCache | None
    ) -> Tensor:
        """Hidden states `[B, L, D]`; the cache is filled.

        Raises:
            CaptureError: it cannot be captured.
        """
        batch, length, _ = inputs.embeds.shape
        start = 0 if cache is None else cache.filled
        entries = length if cache is None else cache.capacity
        size = None if cache is None else (batch, cache.capacity)
        kind = self.model.config._attn_implementation
        key = (_KIND, size, *inputs.shapes, inputs.mask.dtype, kind)

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
                    attention_mask=visible(embeds, mask, place),
                    position_ids=positions,
                    past_key_values=cache,
                    use_cache=cache is not None,
                )
                return out[0]  # type: ignore[no-any-return]

        mask = inputs.mask
        if not self.graphs.holds(key):
            # a buffer for all entries, whatever is filled now
            mask = F.pad(mask, (0, entries - mask.shape[-1]))
        if cache is not None:
            cache.start.fill_(start)
        hidden: Tensor = self.graphs.run(key, run, [inputs.embeds, mask, inputs.positions])
        if cache is not None:
            cache.count(start + length)
        return hidden


def _inputs(kwargs: Mapping[str, Any], embeds: Tensor, behind: int) -> _Inputs:
    """A forward's tensors, with what the stock model would put in the place of missing ones."""
    batch, length, _ = embeds.shape
    mask, positions = kwargs.get("attention_mask"), kwargs.get("position_ids")
    if mask is None:
        mask = torch.ones(batch, behind + length, dtype=torch.long, device=embeds.device)
    if positions is None:
        positions = torch.arange(behind, behind + length, device=embeds.device)[None]
    return _Inputs(embeds, mask, positions)


def _of_cache(size: tuple[int, int], key: Any) -> bool:
    """Whether a captured call works on the cache of this size."""
    return isinstance(key, tuple) and key[:2] == (_KIND, size)
