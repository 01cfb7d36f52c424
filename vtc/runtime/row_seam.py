"""The seam on the rows of decoder layers: visual rows skip work, or are read otherwise, in chosen
layers; no token leaves the sequence.

Hooks stand on the layers only while the language model runs. Where later steps need nothing, it is
stock again behind the prompt.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from contextlib import ExitStack
from functools import partial
from typing import Any

import torch
from torch import nn

from vtc.adapters.base import Adapter
from vtc.errors import PatchError
from vtc.plans import LayerPlan, LayerRule
from vtc.runtime.layers import LayerSeam, check_full_attention, check_mode
from vtc.runtime.row_run import Expected, RowRun
from vtc.runtime.row_state import remember, remembered
from vtc.sites import RowView

# a layer's input and its rule in the plan -> its rule in this call
Refine = Callable[[RowView, LayerRule], LayerRule]


class RowSeam:
    """Hooks on the language model and its layers; one forward of a model at a time.

    Args:
        adapter: describes the model.
        plan: what is decided when the model is patched.
        refined: the layers whose rule `refine` completes in each call.
        refine: does so.
        layers: the seam between the same layers, which may make the sequence shorter.

    Attributes:
        plans: what was in force in the last prefill: one plan, or none.

    Raises:
        UnsupportedModeError: the language model's attention slides over a window.
    """

    def __init__(
        self,
        adapter: Adapter,
        plan: LayerPlan,
        refined: tuple[int, ...],
        refine: Refine,
        layers: LayerSeam,
    ) -> None:
        self._model: Any = adapter.language_model
        self._refined = frozenset(refined)
        self._refine = refine
        self._layers = layers
        self.plan = plan
        self.plans: list[LayerPlan] = []
        if self.acts:
            check_full_attention(self._model.config)
        self._hooks: list[Any] = []
        self._expected: Expected | None = None
        self._run: RowRun | None = None
        self._running = ExitStack()
        self._layer = ExitStack()

    def __reduce_ex__(self, protocol: Any) -> Any:
        raise PatchError(
            "a patched model was to be copied or pickled, expected an unpatched one: the copy "
            "would share the patch; call vtc.unpatch(model) first"
        )

    @property
    def acts(self) -> bool:
        """Whether some layer is not left alone."""
        return bool(self._refined) or not self.plan.is_stock

    @property
    def lasts(self) -> bool:
        """Whether steps behind the prompt differ from stock too."""
        return bool(self._refined) or any(rule.lasts for rule in self.plan.rules)

    @property
    def attached(self) -> bool:
        """Whether the hooks are there."""
        return bool(self._hooks)

    def attach(self) -> None:
        """Register the hooks on the language model."""
        if self._hooks:
            return
        self._hooks = [
            self._model.register_forward_pre_hook(self._before_language, with_kwargs=True),
            # before the report of a direct forward asks for the plan
            self._model.register_forward_hook(self._after_language, prepend=True, always_call=True),
        ]

    def detach(self) -> None:
        """Remove the hooks and everything a broken-off call left."""
        while self._hooks:
            self._hooks.pop().remove()
        self.clear()
        self._end()

    def expect(self, sequence: Expected) -> None:
        """Say that the next run of the language model is the prefill of this sequence."""
        self.plans = []
        self._expected = sequence if self.acts else None

    def clear(self) -> None:
        """Forget a prefill that never came."""
        self._expected = None

    def _end(self) -> None:
        self._layer.close()
        self._running.close()
        self._run = None

    def _before_language(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> None:
        self._end()  # an interrupt runs no hook behind it
        expected, self._expected = self._expected, None
        given = _bound(module, args, kwargs)
        state = remembered(given.get("past_key_values"))
        if expected is None and state is None:
            return
        check_mode(module)
        run = RowRun(self.plan, state, given)
        if expected is not None:
            run.begin(expected)
        self._run = run
        wanted = self._refined if expected is not None else frozenset[int]()
        for i, layer in enumerate(self._model.layers):
            if i in wanted or run.concerns(i):
                hooks = (
                    layer.register_forward_pre_hook(
                        partial(self._before_layer, i), with_kwargs=True
                    ),
                    # nothing of ours is to be seen by other hooks behind the layer
                    layer.register_forward_hook(self._after_layer, prepend=True),
                )
                for hook in hooks:
                    self._running.callback(hook.remove)

    def _before_layer(
        self, layer: int, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        self._layer.close()
        if (run := self._run) is None:
            return None
        given = _bound(module, args, kwargs)
        sequence = run.sequence(self._layers.stage(layer)) if run.is_prefill else None
        if sequence is not None and layer in self._refined:
            view = run.view(layer, sequence, given["hidden_states"])
            with torch.no_grad():
                run.refine(layer, self._refine(view, run.rules[layer]))
        changed = run.enter(layer, module, sequence, given, self._layer)
        if run.asking is not None:
            self._layers.note_asking(layer, *run.asking)
        if changed is None:
            return None
        given = {**given, **changed}
        # by position, as gradient checkpointing wants it
        return (given.pop("hidden_states"),), given

    def _after_layer(self, module: nn.Module, args: Any, output: Any) -> Any:
        run = self._run
        self._layer.close()
        return None if run is None else run.leave(output)

    def _after_language(self, module: nn.Module, args: Any, output: Any) -> None:
        run = self._run
        self._end()
        if run is None or output is None or not run.is_prefill:
            return
        self.plans = [LayerPlan(run.rules, self.plan.scores)]
        cache = getattr(output, "past_key_values", None)
        if cache is not None:
            remember(cache, run.state())


def _bound(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """All inputs by name."""
    if not args:
        return kwargs
    if len(args) == 1 and "hidden_states" not in kwargs and hasattr(module, "self_attn"):
        # as stock language models call their layers; a signature takes long to look up
        return {"hidden_states": args[0], **kwargs}
    return dict(zip(inspect.signature(module.forward).parameters, args)) | kwargs  # noqa: B905
