"""Whether a model is still as it was captured: cheap enough to ask in every call."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from itertools import chain
from typing import Any

from torch import nn

# the hooks by which transformers itself collects hidden states
_OF_TRANSFORMERS = "output_capturing_hook"

Own = Callable[[Any], bool]


def never(hook: Any) -> bool:
    """No hook."""
    return False


class Watch:
    """Looks for what a replay would not see: weights and modules that were replaced, weights that
    were moved (those of the first, middle and last block stand for all), hooks.

    Args:
        modules: of a part of a model.
        blocks: of the part.
        own: whether a hook is known and does no harm.
    """

    def __init__(self, modules: Iterable[nn.Module], blocks: Any, own: Own = never) -> None:
        self._modules, self._own = list(modules), own
        self._hooks = [
            hooks for m in self._modules for hooks in (m._forward_hooks, m._forward_pre_hooks)
        ]
        self._tables: list[dict[str, Any]] = [
            table for m in self._modules for table in (m._modules, m._parameters) if table
        ]
        sample = (m for i in (0, len(blocks) // 2, -1) for m in blocks[i].modules())
        self._weights = [m._parameters for m in sample if m._parameters]
        self._seen = self._now()
        self._attached: tuple[int, str | None] = (-1, None)

    def _now(self) -> tuple[list[int], list[int]]:
        return (
            list(map(id, chain.from_iterable(table.values() for table in self._tables))),
            [w.data_ptr() for ws in self._weights for w in ws.values() if w is not None],
        )

    @property
    def changed(self) -> bool:
        """Whether its weights or modules are no longer those that were captured."""
        return self._now() != self._seen

    def refusal(self) -> str | None:
        """What is attached to modules that no replay would call."""
        hooks = sum(map(len, self._hooks))
        if hooks != self._attached[0]:
            self._attached = hooks, attached(self._modules, self._own)
        return self._attached[1]


def attached(modules: Iterable[nn.Module], own: Own = never) -> str | None:
    """What somebody has attached to modules, that is called when they run, but for `own` hooks."""
    for module in modules:
        if (reason := wrapped(module)) is not None:
            return reason
        hooks = [*module._forward_hooks.values(), *module._forward_pre_hooks.values()]
        if any(getattr(h, "__name__", "") != _OF_TRANSFORMERS and not own(h) for h in hooks):
            return f"a hook is attached to a {type(module).__name__}, which no replay calls"
    return None


def wrapped(module: nn.Module) -> str | None:
    """Whether a module does other than its class says, or depends on a switch."""
    if hasattr(module, "_hf_hook"):
        return "weights are moved by hooks of accelerate while the model runs"
    if type(module).__module__.startswith("peft."):
        return "adapters of PEFT are attached; merge them"
    return None
