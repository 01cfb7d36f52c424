"""The decoder layers before a method's first cut as one captured call.

What a method decides between layers depends on the prompt and runs as it would without the fast
path, and so do the layers behind it.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

from torch import Tensor
from transformers import DynamicCache

from vtc.adapters.base import Adapter
from vtc.runtime.graphs import CaptureError, Graphs
from vtc.runtime.layer_run import LayerRun
from vtc.runtime.layers import LayerSeam
from vtc.runtime.static_cache import CapturedEntries

# what a decoder layer may be told; anything else has to be nothing
_KNOWN = (
    "attention_mask",
    "position_embeddings",
    "position_ids",
    "past_key_values",
    "use_cache",
    "logits_to_keep",
)


class FastPrefix:
    """Stands in for the first decoder layers while a prefill is served.

    Args:
        adapter: describes the model.
        graphs: holds what is captured.
        seam: decides behind these layers.

    Attributes:
        told: how the last prefill ran: the backend, or why the stock model ran it.
    """

    def __init__(self, adapter: Adapter, graphs: Graphs, seam: LayerSeam) -> None:
        self.model: Any = adapter.language_model
        self.graphs, self._seam = graphs, seam
        self.told: str | None = None
        self._done: Tensor | None = None

    @contextmanager
    def serving(self, count: int) -> Iterator[None]:
        """Within it, prefills of this thread have their first `count` layers replayed."""
        owner, layers = threading.get_ident(), list(self.model.layers[:count])
        self.told, self._done = None, None

        def forward(i: int, stock: Any, hidden: Tensor, *args: Any, **kwargs: Any) -> Any:
            if threading.get_ident() != owner or args:
                return stock(hidden, *args, **kwargs)
            if i == 0:
                self._done = self._run(layers, hidden, kwargs)
            # the layers behind the first hand on what the first one gave for all of them
            if self._done is None or (i and hidden is not self._done):
                return stock(hidden, **kwargs)
            return self._done

        with ExitStack() as stack:
            stack.callback(setattr, self, "_done", None)
            for i, layer in enumerate(layers):
                if "forward" not in vars(layer):
                    stack.callback(vars(layer).pop, "forward")
                    layer.forward = partial(forward, i, layer.forward)
            yield

    def _run(self, layers: list[Any], hidden: Tensor, kwargs: dict[str, Any]) -> Tensor | None:
        """What the last of the layers gives, `[B, L, D]`, or None where the stock model has to run
        them."""
        if hidden.shape[1] == 1:
            return None
        cache: Any = kwargs.get("past_key_values")
        mask = kwargs.get("attention_mask")
        reason = odd(kwargs, cache, mask, self._seam.run)
        if reason is None:
            cos, sin = kwargs["position_embeddings"]
            given = [hidden, cos, sin, *([] if mask is None else [mask])]
            kind = self.model.config._attn_implementation
            shapes = tuple((tuple(x.shape), x.dtype) for x in given)
            key = ("first layers", len(layers), cache is not None, shapes, kind)
            run = partial(self._layers, layers, cache is not None)
            try:
                out, groups = self.graphs.run(key, run, given)
                CapturedEntries.into(cache, groups)
                self.told = self.graphs.backend
                return out  # type: ignore[no-any-return]
            except CaptureError as error:
                reason = str(error)
        self.told = reason
        return None

    def _layers(
        self,
        layers: list[Any],
        keeps: bool,
        hidden: Tensor,
        cos: Tensor,
        sin: Tensor,
        mask: Tensor | None = None,
    ) -> tuple[Tensor, list[Tensor]]:
        """The layers' output, and the keys and values of all."""
        cache = CapturedEntries(len(layers)) if keeps else None
        for layer in layers:
            hidden = type(layer).forward(
                layer,
                hidden,
                attention_mask=mask,
                position_embeddings=(cos, sin),
                past_key_values=cache,
                use_cache=keeps,
            )
        return hidden, [] if cache is None else cache.groups


def odd(kwargs: dict[str, Any], cache: Any, mask: Any, run: LayerRun | None) -> str | None:
    """Why the layers of this prefill are left to the stock model."""
    if run is not None and run.records:
        return "hidden states or attentions are wanted"
    if not (cache is None or (type(cache) is DynamicCache and not cache.get_seq_length())):
        return "it goes on behind a cache of the caller's"
    if not (mask is None or isinstance(mask, Tensor)):
        return f"its mask is a {type(mask).__name__}"
    for name, value in kwargs.items():
        if name not in _KNOWN and value is not None and value is not False:
            return f"decoder layers are given {name}"
    return None
