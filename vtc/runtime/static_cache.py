"""Keys and values at fixed addresses, for captured prefills and decode steps.

A `StaticCache` of transformers whose length the host knows, so that nothing waits for the device.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
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
            for x in (key_states, value_states):
                rows = (*x.shape[:2], self.max_cache_len, x.shape[-1])
                self._memory.append(x.new_zeros((self._layers, *rows)))
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
            layer = DynamicLayer()
            layer.lazy_initialization(keys[i], values[i])
            layer.keys, layer.values = keys[i], values[i]
            copy.layers.append(layer)
        return copy
