"""What a cache must remember of layers in which visual tokens are read otherwise than in stock."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from vtc.errors import UnsupportedModeError
from vtc.plans import LayerRule
from vtc.runtime.layer_cache import filled

_STATE = "_vtc_rows"


@dataclass(frozen=True, eq=False)
class RowState:
    """What is known of some layers' keys.

    Attributes:
        rules: by decoder layer, what was in force there; their `unread` and `sinks` are over the
            keys of that layer. Later steps need those that last, later prompts all of them.
        visual: by decoder layer, `bool[B, S]`, its visual keys.
        batch: B.
    """

    rules: Mapping[int, LayerRule]
    visual: Mapping[int, Tensor]
    batch: int

    def check(self, batch: int) -> None:
        """Refuse a batch that cannot be these rows, each repeated."""
        if batch % self.batch:
            raise UnsupportedModeError(
                f"a step of batch {batch} continues a cache of batch {self.batch} whose visual "
                "tokens are read by a method's own rule, expected a multiple of it: use generate() "
                "for beams"
            )


def remember(cache: Any, state: RowState | None) -> None:
    """Note a state on a cache, or forget the one that is there."""
    if state is not None and state.rules:
        setattr(cache, _STATE, state)
    elif hasattr(cache, _STATE):
        delattr(cache, _STATE)


def remembered(cache: Any) -> RowState | None:
    """The state on a cache that holds something."""
    state = getattr(cache, _STATE, None)
    if state is not None and filled(cache) == 0:
        delattr(cache, _STATE)  # a static cache that was reset for another prompt
        return None
    return state


def behind(
    state: RowState | None, layer: int, held: int, rule: LayerRule, visual: Tensor
) -> tuple[LayerRule, Tensor]:
    """A rule over this run's entries, and which of them are visual, with those before them.

    Args:
        state: what the cache remembers.
        layer: the decoder layer.
        held: entries that its cache holds.
        rule: its `unread` and `sinks` are `bool[B, L]`.
        visual: `bool[B, L]`.
    """
    before = None if state is None else state.rules.get(layer)
    past = None if state is None else state.visual.get(layer)

    def joined(then: Tensor | None, now: Tensor | None) -> Tensor | None:
        if then is None and now is None:
            return None
        now = torch.zeros_like(visual) if now is None else now.to(visual.device)
        then = visual.new_zeros(len(visual), 0) if then is None else then.to(visual.device)
        # rows that beams, or several sequences for a prompt, have left in the cache
        then = then.repeat_interleave(len(visual) // len(then), 0)
        return torch.cat([F.pad(then, (0, held - then.shape[1])), now], 1)

    whole = replace(
        rule,
        unread=joined(None if before is None else before.unread, rule.unread),
        sinks=joined(None if before is None else before.sinks, rule.sinks),
        # sinks of an earlier turn stay, also where this one's images have none
        redistribution=rule.redistribution or (None if before is None else before.redistribution),
    )
    seen = joined(past, visual)
    return whole, visual if seen is None else seen
