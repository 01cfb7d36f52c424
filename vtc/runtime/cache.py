"""What a cache with a compressed prompt must remember; it lives on the cache, exactly as long."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor

_STATE = "_vtc_compressed"


@dataclass(frozen=True, eq=False)
class CacheState:
    """What a cache with a compressed prompt must remember.

    Attributes:
        prompt: length of the original prompt.
        mask: `[B, L]` over the entries in the cache.
        shift: `[(P,) B, 1]`, subtracted from the position ids that the stock model would use later.
        following: `[B, 1]`, the position id that comes next.
        whole: nothing was dropped: later steps are stock, and so is a turn without images.
    """

    prompt: int
    mask: Tensor
    shift: Tensor
    following: Tensor
    whole: bool = False


def remember(cache: Any, state: CacheState | None) -> None:
    """Note on a cache that its prompt was compressed, or that it was not."""
    if state is not None and cache is not None:
        setattr(cache, _STATE, state)
    elif hasattr(cache, _STATE):
        delattr(cache, _STATE)  # a static cache that is used again


def remembered(cache: Any) -> CacheState | None:
    """The state on a cache, if it holds a prompt with images of this package's making now."""
    state: CacheState | None = getattr(cache, _STATE, None)
    if state is not None and filled(cache) == 0:
        delattr(cache, _STATE)  # a static cache that was reset for another prompt
        return None
    return state


def compressed(cache: Any) -> CacheState | None:
    """The state on a cache whose prompt was shortened: later steps cannot be stock."""
    state = remembered(cache)
    return None if state is None or state.whole else state


def filled(cache: Any) -> int:
    """How many entries a cache holds; None holds none."""
    return int(cache.get_seq_length()) if cache is not None else 0
