"""Floating-point operations of a call: an estimate of work, which is not a measure of time.

Rule: `torch.utils.flop_counter` over one call up to the first token. It counts two operations for
each multiplication in a matrix product, a convolution or attention (a causal mask saves nothing),
in the encoder, in the selection and in the language model; element-wise work, sorting and what
runs in a Triton kernel count as none.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count


def flops_of(call: Callable[[], object]) -> int:
    """The operations that one call takes; it is run."""
    # torch's own list lacks what runs on a CPU
    attention = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    with FlopCounterMode(display=False, custom_mapping={attention: _attention}) as counter:
        call()
    return int(counter.get_total_flops())


def _attention(query: Any, key: Any, value: Any, *_: Any, **__: Any) -> int:
    return int(sdpa_flop_count(query, key, value))
