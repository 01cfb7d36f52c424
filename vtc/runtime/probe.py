"""Queries, keys and values of single attention modules, while the model stays on sdpa or flash.

One attention module's `config` is replaced by a shallow copy that names a function of ours. A probe
looks at q, k and v, then delegates to the implementation that was there: the module's output is
bit-identical. An interception computes the output itself. Nothing is attached outside of the calls
that need it.
"""

from __future__ import annotations

import copy
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from vtc.runtime.segments import by_segment

_NAME = "vtc_probe"
# packed encoders hand a whole sequence over to what is called flash, and walk over it otherwise
_PACKED = "vtc_flash_segments"
_lock = threading.Lock()
_users = 0

# query, key, value `[B, H, ..., d]` and what q·k is multiplied by
See = Callable[[Tensor, Tensor, Tensor, float], None]
# the query -> an additive mask `[B, 1, 1, keys]` in place of None, or None; `together`: over the
# whole sequence
Mask = Callable[[Tensor], Tensor | None]
Attended = tuple[Tensor, Tensor | None]
# the implementation that was there, of the same inputs but the module and the options
Stock = Callable[[Tensor, Tensor, Tensor, Tensor | None], Attended]
# stock, query, key, value, mask, scale -> output `[B, rows, H, d]`
Attend = Callable[[Stock, Tensor, Tensor, Tensor, Tensor | None, float], Tensor]


@dataclass(frozen=True)
class _Interest:
    """What one user of an attention module wants."""

    before: Any
    see: See | None = None
    mask: Mask | None = None
    attend: Attend | None = None
    together: bool = False


@contextmanager
def together(attention: nn.Module) -> Iterator[None]:
    """Within it, a module of a packed encoder attends in all segments at once, whose borders must
    be on the CPU; probes on it see one sequence."""
    with _attached(attention, together=True):
        yield


@contextmanager
def probed(attention: nn.Module, see: See, mask: Mask | None = None) -> Iterator[None]:
    """Within it, `see` is called whenever `attention` attends; `mask` gives a mask to a module that
    takes none."""
    with _attached(attention, see=see, mask=mask):
        yield


@contextmanager
def intercepted(attention: nn.Module, attend: Attend) -> Iterator[None]:
    """Within it, `attend` says what `attention` gives; probes on the same module see as before."""
    with _attached(attention, attend=attend):
        yield


def implementation(attention: nn.Module) -> str:
    """The name of the implementation that `attention` uses, whatever is attached to it."""
    config: Any = attention.config
    while (interest := vars(config).get("vtc_probe")) is not None:
        config = interest.before
    return str(config._attn_implementation)


@contextmanager
def _attached(attention: nn.Module, **interest: Any) -> Iterator[None]:
    module: Any = attention
    before = module.config
    config = copy.copy(before)
    packed = interest.get("together") or before._attn_implementation == _PACKED
    config._attn_implementation = _PACKED if packed else _NAME
    config.vtc_probe = _Interest(before, **interest)
    with _registered():
        module.config = config
        try:
            yield
        finally:
            module.config = before


@contextmanager
def _registered() -> Iterator[None]:
    """Our name is known to transformers only while somebody uses it."""
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    global _users
    with _lock:
        if _users == 0:
            ALL_ATTENTION_FUNCTIONS[_NAME] = _attend
            ALL_ATTENTION_FUNCTIONS[_PACKED] = _attend
        _users += 1
    try:
        yield
    finally:
        with _lock:
            _users -= 1
            if _users == 0:
                del ALL_ATTENTION_FUNCTIONS[_NAME]
                del ALL_ATTENTION_FUNCTIONS[_PACKED]


@torch.compiler.disable  # type: ignore[untyped-decorator]
def _attend(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    **kwargs: Any,
) -> Attended:
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    given = kwargs.get("scaling")
    scale = query.shape[-1] ** -0.5 if given is None else given
    top: Any = module.config
    config, mask, attend = top, None, None
    while (interest := vars(config).get("vtc_probe")) is not None:
        if interest.see is not None:
            interest.see(query.detach(), key.detach(), value.detach(), scale)
        mask, attend = mask or interest.mask, attend or interest.attend
        config = interest.before
    name = config._attn_implementation
    replaced = None if mask is None else mask(query)
    if replaced is not None:
        attention_mask = replaced
        # flash attention takes no such mask
        name = name if name in ("eager", "sdpa") else "sdpa"
    eager = getattr(sys.modules[type(module).__module__], "eager_attention_forward", None)

    def stock(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> Attended:
        implementation: Any = ALL_ATTENTION_FUNCTIONS.get_interface(name, eager)
        # some implementations look their own name up in the module's config (flash attention does)
        module.config = config
        try:
            if top._attn_implementation == _PACKED:
                bias = None if replaced is None else mask
                return by_segment(implementation, module, query, key, value, bias, **kwargs)
            return implementation(module, query, key, value, mask, **kwargs)  # type: ignore[no-any-return]
        finally:
            module.config = top

    if attend is None:
        return stock(query, key, value, attention_mask)
    return attend(stock, query, key, value, attention_mask, scale), None
