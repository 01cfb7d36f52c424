"""Whether a model is still as it was captured: cheap enough to ask in every call."""

from __future__ import annotations

from typing import Any

from torch import nn

# the hooks by which transformers itself collects hidden states
_OF_TRANSFORMERS = "output_capturing_hook"


class Watch:
    """Looks for what a replay would not see: moved or replaced weights, modules put in, hooks.

    Hooks are looked for on every module of a part, the rest on its first, middle and last block.

    Args:
        part: a tower or a language model. Hooks on itself are run around a replay.
        blocks: its blocks.
    """

    def __init__(self, part: nn.Module, blocks: Any) -> None:
        self._modules = [module for module in part.modules() if module is not part]
        self._hooks = [
            hooks for m in self._modules for hooks in (m._forward_hooks, m._forward_pre_hooks)
        ]
        sample = [m for i in (0, len(blocks) // 2, -1) for m in blocks[i].modules()]
        self._children = [m._modules for m in sample if m._modules]
        self._weights = [m._parameters for m in sample if m._parameters]
        self._seen = self._now()
        self._attached: tuple[int, str | None] = (-1, None)

    def _now(self) -> tuple[Any, ...]:
        return (
            [id(child) for children in self._children for child in children.values()],
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
            self._attached = hooks, self._look()
        return self._attached[1]

    def _look(self) -> str | None:
        for module in self._modules:
            if hasattr(module, "_hf_hook"):
                return "weights are moved by hooks of accelerate while the model runs"
            if type(module).__module__.startswith("peft."):
                return "adapters of PEFT are attached; merge them"
            if hooked(module):
                return f"a hook is attached to a {type(module).__name__}, which no replay calls"
        return None


def hooked(module: nn.Module) -> bool:
    """Whether somebody has attached something that is called when the module runs."""
    hooks = [*module._forward_hooks.values(), *module._forward_pre_hooks.values()]
    return any(getattr(hook, "__name__", "") != _OF_TRANSFORMERS for hook in hooks)
