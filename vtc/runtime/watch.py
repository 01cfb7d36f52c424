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
    """Looks for what a replay would not see: modules that were replaced or are run by other code,
    weights and buffers that lie elsewhere, hooks.

    Args:
        modules: of a part of a model.
        around: modules around the part, whose own hooks are run around a replay.
        own: whether a hook is known and does no harm.
    """

    def __init__(
        self,
        modules: Iterable[nn.Module],
        around: Iterable[nn.Module] = (),
        own: Own = never,
    ) -> None:
        self._modules, self._own = list(modules), own
        self._hooks = [
            hooks for m in self._modules for hooks in (m._forward_hooks, m._forward_pre_hooks)
        ]
        parts = [*self._modules, *around]
        self._vars = list(map(vars, parts))
        self._children = [m._modules for m in parts if m._modules]
        self._tensors: list[dict[str, Any]] = [
            table for m in parts for table in (m._parameters, m._buffers) if table
        ]
        self._seen = self._now()
        self._attached: tuple[int, str | None] = (-1, None)

    def _now(self) -> tuple[list[Any], ...]:
        tensors = chain.from_iterable(table.values() for table in self._tensors)
        return (
            [own.get("forward") for own in self._vars],
            list(map(id, chain.from_iterable(table.values() for table in self._children))),
            [None if x is None else x.data_ptr() for x in tensors],
        )

    @property
    def changed(self) -> bool:
        """Whether it is no longer what was captured."""
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
