"""Keys and values at fixed addresses, for captured prefills and decode steps.

A `StaticCache` of transformers whose length the host knows, so that nothing waits for the device.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache, StaticCache
from transformers.cache_utils import StaticLayer


class CountedLayer(StaticLayer):
    """A static layer that also counts on the host.

    Attributes:
        filled: its entries.
        tracing: whether its length is asked for by something that is replayed at other lengths.
    """

    # generate must neither compile for it nor make its masks: the captured call does
    is_compileable = False

    def __init__(self, max_cache_len: int, count: Tensor) -> None:
        super().__init__(max_cache_len)
        self.filled, self.tracing = 0, False
        self._count = count

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Allocate; the device's count is one of a row, so that all are reset at once."""
        super().lazy_initialization(key_states, value_states)
        self.cumulative_length = self._count

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        """Add entries."""
        self.filled += key_states.shape[-2]
        return super().update(key_states, value_states, *args, **kwargs)

    def get_seq_length(self) -> Any:
        """Its entries: a number, or a tensor where that is part of what is captured."""
        if self.tracing:
            return self._count
        return self.filled


class CountedCache(StaticCache):
    """A cache of one batch size and capacity, used by one generate after the other.

    Args:
        config: of the text model.
        capacity: entries of a row.
        device: of the language model.
    """

    def __init__(self, config: Any, capacity: int, device: torch.device) -> None:
        super().__init__(config=config, max_cache_len=capacity)
        self.capacity = capacity
        self._counts = torch.zeros(len(self.layers), dtype=torch.long, device=device)
        self.layers = [CountedLayer(capacity, self._counts[i]) for i in range(len(self.layers))]

    @staticmethod
    def fits(config: Any) -> bool:
        """Whether all layers of such a text model hold every entry."""
        kinds = getattr(config.get_text_config(decoder=True), "layer_types", None)
        return kinds is None or set(kinds) <= {"full_attention"}

    @property
    def filled(self) -> int:
        """Entries, the same in all layers."""
        return int(self.layers[0].filled)

    def at(self, length: int) -> None:
        """Say that there are so many entries, on the host and on the device."""
        for layer in self.layers:
            layer.filled = length
        self._counts.fill_(length)

    def count(self, length: int) -> None:
        """Say on the host that there are so many entries: the device has counted by itself."""
        for layer in self.layers:
            layer.filled = length

    def clean(self) -> None:
        """Take away numbers that are not finite: what is masked is still multiplied by zero."""
        there = [layer for layer in self.layers if layer.is_initialized]
        if there:
            torch._foreach_zero_([x for layer in there for x in (layer.keys, layer.values)])

    def trace(self, tracing: bool) -> None:
        """Whether lengths are asked for by something that is being captured."""
        for layer in self.layers:
            layer.tracing = tracing

    def held_bytes(self) -> int:
        """Memory that its entries take."""
        found = [getattr(layer, name, None) for layer in self.layers for name in ("keys", "values")]
        return sum(x.nbytes for x in found if isinstance(x, Tensor))

    def snapshot(self) -> DynamicCache:
        """A cache that lives on by itself."""
        copy = DynamicCache()
        for i, layer in enumerate(self.layers):
            length = layer.filled
            copy.update(layer.keys[:, :, :length].clone(), layer.values[:, :, :length].clone(), i)
        return copy
