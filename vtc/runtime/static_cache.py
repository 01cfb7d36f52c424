"""Keys and values at fixed addresses, for captured prefills and decode steps.

A `StaticCache` of transformers whose length the host knows, so that nothing waits for the device.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache, StaticCache
from transformers.cache_utils import DynamicLayer, StaticLayer


class CountedLayer(StaticLayer):  # type: ignore[misc]
    """A static layer that counts on the host.

    Attributes:
        filled: its entries.
        place: where the next entries go, `int64[n]`, while it is part of what is captured: then the
            host must not count. None: behind those that are there.
    """

    # generate must neither compile for it nor make its masks: the captured call does
    is_compileable = False

    def __init__(self, max_cache_len: int, index: int, layers: int, memory: list[Tensor]) -> None:
        super().__init__(max_cache_len)
        self.filled = 0
        self._index, self._layers, self._memory = index, layers, memory
        self.place: Tensor | None = None

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Take its part of the memory of all layers, which the first one allocates."""
        self.dtype, self.device = key_states.dtype, key_states.device
        self.batch_size, self.num_heads = key_states.shape[:2]
        self.k_head_dim, self.v_head_dim = key_states.shape[-1], value_states.shape[-1]
        if not self._memory:
            # both or none: there may be memory for one of them only
            self._memory += [
                x.new_zeros(self._layers, *x.shape[:2], self.max_cache_len, x.shape[-1])
                for x in (key_states, value_states)
            ]
        self.keys, self.values = (memory[self._index] for memory in self._memory)
        self.is_initialized = True

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        """Add entries `[B, H, n, d]`; returns all, `[B, H, capacity, d]`."""
        if not self.is_initialized:
            # what one call makes under inference_mode, another could not write to
            with torch.inference_mode(False):
                self.lazy_initialization(key_states, value_states)
        place = self.place
        if place is None:
            end = self.filled + key_states.shape[-2]
            place = torch.arange(self.filled, end, device=key_states.device)
            self.filled = end
        self.keys.index_copy_(2, place, key_states)
        self.values.index_copy_(2, place, value_states)
        return self.keys, self.values

    def get_seq_length(self) -> int:
        """Its entries."""
        return self.filled


class CountedCache(StaticCache):  # type: ignore[misc]
    """A cache of one batch size and capacity, used by one generate after the other.

    Args:
        config: of the text model.
        capacity: entries of a row.
        device: of the language model.

    Attributes:
        start: the number of entries on the device, `int64[]`, for what is captured.
    """

    def __init__(self, config: Any, capacity: int, device: torch.device) -> None:
        super().__init__(config=config, max_cache_len=capacity)
        self.capacity = capacity
        # keys, then values of all layers, once there are any: what is done to all is done at once
        self._memory: list[Tensor] = []
        count = len(self.layers)
        self.layers: list[Any] = [
            CountedLayer(capacity, i, count, self._memory) for i in range(count)
        ]
        self.start = torch.zeros((), dtype=torch.long, device=device)

    @staticmethod
    def fits(config: Any) -> bool:
        """Whether all layers of such a text model hold every entry."""
        config = config.get_text_config(decoder=True)
        kinds = getattr(config, "layer_types", None)
        if kinds is None:
            return getattr(config, "sliding_window", None) is None
        return set(kinds) <= {"full_attention"}

    @property
    def filled(self) -> int:
        """Entries, the same in all layers."""
        return int(self.layers[0].filled)

    def count(self, length: int) -> None:
        """Say that there are so many entries."""
        for layer in self.layers:
            layer.filled = length

    @contextmanager
    def placing(self, length: int) -> Iterator[Tensor]:
        """Within it, so many entries are added behind `start` entries, wherever that is on the
        device; yields their places, `int64[length]`."""
        place = self.start + torch.arange(length, device=self.start.device)
        for layer in self.layers:
            layer.place = place
        try:
            yield place
        finally:
            for layer in self.layers:
                layer.place = None

    def clean(self) -> None:
        """Take away numbers that may not be finite: what is masked is multiplied by zero still."""
        for memory in self._memory:
            memory.zero_()

    def held_bytes(self) -> int:
        """Memory that its entries take."""
        return sum(memory.nbytes for memory in self._memory)

    def snapshot(self) -> DynamicCache:
        """A cache that lives on by itself."""
        keys, values = (memory[..., : self.filled, :].clone() for memory in self._memory)
        copy = DynamicCache()
        for i in range(len(self.layers)):
            fill(copy, i, keys[i], values[i])
        return copy


def fill(cache: DynamicCache, layer: int, keys: Tensor, values: Tensor) -> None:
    """Let a layer of an empty cache hold these tensors, not copies of them."""
    while len(cache.layers) <= layer:
        cache.layers.append(DynamicLayer())
    own = cache.layers[layer]
    own.dtype, own.device, own.is_initialized = keys.dtype, keys.device, True
    own.keys, own.values = keys, values


class CapturedEntries:
    """In the place of an empty cache while a prefill is captured: of layers with equally many
    entries all keys and values are one tensor, which leaves the captured call as one copy.

    Args:
        layers: how many.
        cuts: the layers behind which their number may change, ascending.

    Attributes:
        groups: of each group of layers `[2, layers, B, H, L, d]`, keys first.
    """

    def __init__(self, layers: int, cuts: tuple[int, ...] = ()) -> None:
        self._cuts = cuts
        ends = (0, *(cut + 1 for cut in cuts), layers)
        self._counts = [end - start for start, end in pairwise(ends)]
        self.groups: list[Tensor] = []

    def update(
        self, keys: Tensor, values: Tensor, layer: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """All entries of a layer, `[B, H, L, d]` each."""
        group = bisect_left(self._cuts, layer)
        first = self._cuts[group - 1] + 1 if group else 0
        if len(self.groups) == group:
            self.groups.append(keys.new_empty(2, self._counts[group], *keys.shape))
        held = self.groups[group][:, layer - first]
        for own, given in zip(held, (keys, values), strict=True):
            own.copy_(given)
        return held[0], held[1]

    def get_seq_length(self, layer: int = 0) -> int:
        """What was there before."""
        return 0

    @staticmethod
    def into(cache: DynamicCache, groups: list[Tensor]) -> None:
        """Fill an empty cache, layer by layer."""
        pairs = [pair for group in groups for pair in zip(*group.unbind(0), strict=True)]
        for layer, (keys, values) in enumerate(pairs):
            fill(cache, layer, keys, values)
