"""What one attention module sees, while the model stays on sdpa, eager or flash.

The module's `config` is replaced by a shallow copy that names a probe function. The probe looks at
queries, keys and values, then delegates to the implementation that was there: the output is
bit-identical. Nothing is attached outside of the calls that need it.
"""

from __future__ import annotations

import copy
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

# query [B, H, S, d], key and value [B, heads of keys, T, d], rotary positions applied; scale of q·k
See = Callable[[Tensor, Tensor, Tensor, float], None]

_NAME = "vtc_attention_probe"
_lock = threading.Lock()
_users = 0


@contextmanager
def probed(attention: nn.Module, see: See) -> Iterator[None]:
    """Within it, `see` is called with what each run of `attention` computes with."""
    module: Any = attention
    before = module.config
    config = copy.copy(before)
    config._attn_implementation = _NAME
    config.vtc_probe = (see, before)
    with _registered():
        module.config = config
        try:
            yield
        finally:
            module.config = before


@contextmanager
def _registered() -> Iterator[None]:
    """The probe's name is known to transformers only while somebody uses it."""
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    global _users
    with _lock:
        if _users == 0:
            ALL_ATTENTION_FUNCTIONS[_NAME] = _attend
        _users += 1
    try:
        yield
    finally:
        with _lock:
            _users -= 1
            if _users == 0:
                del ALL_ATTENTION_FUNCTIONS[_NAME]


def _attend(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    probing: Any = module.config
    see, config = probing.vtc_probe
    scale = kwargs.get("scaling")
    see(query, key, value, query.shape[-1] ** -0.5 if scale is None else scale)
    eager = getattr(sys.modules[type(module).__module__], "eager_attention_forward", None)
    stock: Any = ALL_ATTENTION_FUNCTIONS.get_interface(config._attn_implementation, eager)
    # some implementations look their own name up in the module's config (flash attention does)
    module.config = config
    try:
        return stock(module, query, key, value, attention_mask, **kwargs)  # type: ignore[no-any-return]
    finally:
        module.config = probing
