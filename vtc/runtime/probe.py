"""Attention rows of single encoder blocks, while the tower stays on sdpa or flash.

One attention module's `config` is replaced by a shallow copy that names a probe function. The probe
looks at q and k, then delegates to the implementation that was there: the tower's output is
bit-identical. Nothing is attached outside of the calls that need it.
"""

from __future__ import annotations

import copy
import sys
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from vtc import ops
from vtc.adapters.base import Encoder
from vtc.errors import SignalError
from vtc.types import Signal

_NAME = "vtc_probe"
_lock = threading.Lock()
_users = 0


class EncoderSignals:
    """Captures exactly the encoder signals that a method needs.

    Args:
        encoder: the tower's description.
        needs: the method's signals.

    Raises:
        SignalError: the encoder cannot give one of them, or a block window is empty on its depth.
    """

    def __init__(self, encoder: Encoder, needs: tuple[Signal, ...]) -> None:
        self._encoder = encoder
        self._windows = {
            s: s.resolve(encoder.depth, encoder.tap) for s in needs if s.name == "cls_row"
        }
        if self._windows and not encoder.has_cls:
            raise SignalError(
                "this method scores patches by the attention of [CLS], expected an encoder with a "
                "[CLS] token but this one has none; choose a method without it (see `vtc methods`)"
            )
        if unknown := sorted({s.name for s in needs} - {"cls_row", "image_key"}):
            raise SignalError(
                f"signal {unknown[0]!r} is unknown; expected 'cls_row' or 'image_key'"
            )
        self._rows: dict[int, Tensor] = {}

    @property
    def blocks(self) -> tuple[int, ...]:
        """The encoder blocks that are probed."""
        return tuple(sorted({b for window in self._windows.values() for b in window}))

    @contextmanager
    def recording(self) -> Iterator[None]:
        """Within it, every run of the tower leaves its signals here."""
        self._rows.clear()
        with ExitStack() as stack:
            for block in self.blocks:
                stack.enter_context(_probed(self._encoder.attentions[block], self, block))
            yield

    def see(self, block: int, query: Tensor, key: Tensor, scale: float) -> None:
        """Note the [CLS] row of one block: one query against all keys."""
        row = ops.attention_rows(query[:, :, :1].detach(), key.detach(), scale)
        self._rows[block] = row[:, 0, 1:]

    def read(self, width: int) -> dict[str, Tensor]:
        """The signals by key, `cls_row` as `float32[G, L, N]`; `width` is N."""
        found = {}
        for signal, window in self._windows.items():
            missing = [b for b in window if b not in self._rows]
            if missing:
                raise SignalError(
                    f"signal {signal.name!r}: encoder blocks {missing} were not run in this call; "
                    "pass pixel_values, not features computed before"
                )
            rows = torch.stack([self._rows[b] for b in window], 1)
            if rows.shape[-1] != width:
                raise SignalError(
                    f"signal {signal.name!r} has {rows.shape[-1]} patches, expected {width}"
                )
            found[signal.key] = rows
        return found


@contextmanager
def _probed(attention: nn.Module, signals: EncoderSignals, block: int) -> Iterator[None]:
    module: Any = attention
    before = module.config
    probed = copy.copy(before)
    probed._attn_implementation = _NAME
    probed.vtc_probe = (signals, block, before)
    with _registered():
        module.config = probed
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

    probed: Any = module.config
    signals, block, config = probed.vtc_probe
    scale = kwargs.get("scaling")
    signals.see(block, query, key, query.shape[-1] ** -0.5 if scale is None else scale)
    eager = getattr(sys.modules[type(module).__module__], "eager_attention_forward", None)
    stock: Any = ALL_ATTENTION_FUNCTIONS.get_interface(config._attn_implementation, eager)
    # some implementations look their own name up in the module's config (flash attention does)
    module.config = config
    try:
        return stock(module, query, key, value, attention_mask, **kwargs)  # type: ignore[no-any-return]
    finally:
        module.config = probed
