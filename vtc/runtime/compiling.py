"""Repeated blocks compiled by torch: one compilation for all blocks of a shape, for captured calls.

It fuses what lies between matrix products: norms, rotary positions, activations.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from vtc.adapters.base import Encoder
from vtc.runtime.static_cache import CountedCache

# one for each bucket of the prefill and each cache, where torch's own limit is 8
_COMPILATIONS = 64


@functools.cache
def _compiled(kind: Any, whole: bool = True) -> Any:
    """The forward of a class of modules, compiled anew for each shape and shared by its modules;
    `whole` refuses what cannot be compiled in one piece."""
    return torch.compile(kind.forward, fullgraph=whole, dynamic=False)


class _Slot:
    """The cache of one layer as the only layer, so that all layers look alike to the compiler."""

    def __init__(self, keys: Tensor, values: Tensor, place: Tensor) -> None:
        self.keys, self.values, self.place = keys, values, place

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        """As `CountedLayer.update`."""
        self.keys.index_copy_(2, self.place, key_states)
        self.values.index_copy_(2, self.place, value_states)
        return self.keys, self.values


@contextmanager
def _forwards(found: Iterable[tuple[nn.Module, Any]]) -> Iterator[None]:
    """Within it, modules run these functions instead of their own forward."""
    with ExitStack() as stack:
        stack.enter_context(torch._dynamo.config.patch(recompile_limit=_COMPILATIONS))
        for module, forward in found:
            if "forward" in vars(module):  # somebody else's
                continue
            module.forward = forward
            stack.callback(vars(module).pop, "forward")
        yield


@contextmanager
def compiled_layers(layers: Iterable[Any], cache: CountedCache | None) -> Iterator[None]:
    """Within it, decoder layers run compiled, on a cache whose memory is there."""
    with ExitStack() as stack:
        found = []
        for i, layer in enumerate(layers):
            held = None if cache is None else cache.layers[i]
            # the number of a layer would make it a compilation of its own
            stack.callback(setattr, layer.self_attn, "layer_idx", layer.self_attn.layer_idx)
            layer.self_attn.layer_idx = 0
            found.append((layer, functools.partial(_layer, layer, held)))
        stack.enter_context(_forwards(found))
        yield


def _layer(layer: nn.Module, held: Any, hidden: Tensor, **kwargs: Any) -> Any:
    if held is not None:
        kwargs["past_key_values"] = _Slot(held.keys, held.values, held.place)
    kind: Any = type(layer)
    return _compiled(kind)(layer, hidden, **kwargs)


@contextmanager
def compiled_blocks(encoder: Encoder) -> Iterator[None]:
    """Within it, encoder blocks run compiled, but for what is attended to."""
    found = []
    for block, attention in zip(encoder.blocks, encoder.attentions, strict=True):
        for module in block.children():
            if any(True for _ in module.parameters()):
                # packed encoders turn queries and keys in single precision, step by step
                broken = module is attention
                if broken and not encoder.packed:
                    continue
                kind: Any = type(module)
                forward = _compiled(kind, not broken)
                found.append((module, functools.partial(forward, module)))
    with _forwards(found):
        yield
