"""Queries, keys and values of single attention modules, while the model stays on sdpa or flash.

One attention module's `config` is replaced by a shallow copy that names a probe function. The probe
looks at q, k and v, then delegates to the implementation that was there: the module's output is
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

_NAME = "vtc_probe"
_lock = threading.Lock()
_users = 0

# query, key, value `[B, H, ..., d]` and what q·k is multiplied by
See = Callable[[Tensor, Tensor, Tensor, float], None]
# the query -> an additive mask `[B, 1, 1, keys]` in place of None, or None
Mask = Callable[[Tensor], Tensor | None]


@contextmanager
def probed(attention: nn.Module, see: See, mask: Mask | None = None) -> Iterator[None]:
    """Within it, `see` is called whenever `attention` attends; `mask` gives a mask to a module that
    takes none."""
    module: Any = attention
    before = module.config
    config = copy.copy(before)
    config._attn_implementation = _NAME
    config.vtc_probe = (see, mask, before)
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

    probed_config: Any = module.config
    see, mask, config = probed_config.vtc_probe
    scale = kwargs.get("scaling")
    see(
        query.detach(),
        key.detach(),
        value.detach(),
        query.shape[-1] ** -0.5 if scale is None else scale,
    )
    name = config._attn_implementation
    if mask is not None and (given := mask(query)) is not None:
        attention_mask = given
        # flash attention takes no such mask
        name = name if name in ("eager", "sdpa") else "sdpa"
    eager = getattr(sys.modules[type(module).__module__], "eager_attention_forward", None)
    stock: Any = ALL_ATTENTION_FUNCTIONS.get_interface(name, eager)
    # some implementations look their own name up in the module's config (flash attention does)
    module.config = config
    try:
        return stock(module, query, key, value, attention_mask, **kwargs)  # type: ignore[no-any-return]
    finally:
        module.config = probed_config
