"""The seam between decoder layers: visual tokens leave the sequence, and its cache, for good.

A layer's attention is probed in the prefill; from the next layer on, hidden states, masks and
rotary angles are those of the survivors. Later steps need masks of their own in these layers; what
they need to know travels on the cache object. The hooks are host logic that cannot be compiled:
generation on a GPU needs `disable_compile=True`.
"""

from __future__ import annotations

import inspect
from bisect import bisect_left
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from vtc.adapters.base import Adapter
from vtc.errors import PatchError, SignalError, UnsupportedModeError
from vtc.methods.base import Method
from vtc.runtime.clock import Clock
from vtc.runtime.layer_cache import remembered
from vtc.runtime.layer_positions import Recounted
from vtc.runtime.layer_run import LayerRun
from vtc.runtime.layer_stage import LayerDecision, Placed, Stage
from vtc.runtime.probe import probed
from vtc.sites import Facts, LayerCut, LayerView, checked_cut
from vtc.types import Budget


class LayerSeam:
    """Hooks on the language model and its layers; one forward of a model at a time.

    With `method.drops_earlier_kv`, layers before a cut stop reading what was cut once the prefill
    is over. Its keys and values stay allocated there: the cache's first layer tells generate how
    long the sequence is.

    Args:
        adapter: describes the model.
        method: decides, by `layer_cut`.
        layers: the layers after which it decides, 0-based.
        budget_of: the budget in force.
        facts: of the model, for methods that go by them.
        recounts: whether positions are counted anew behind what was cut.

    Raises:
        SignalError: the model has no such layers, or none that can be cut after.
        UnsupportedModeError: its attention slides over a window.
    """

    def __init__(
        self,
        adapter: Adapter,
        method: Method,
        layers: tuple[int, ...],
        budget_of: Callable[[], Budget],
        facts: Facts | None = None,
        recounts: bool = False,
    ) -> None:
        self._adapter = adapter
        self.recounts = recounts
        self._language_model: Any = adapter.language_model
        self._method = method
        self._cuts = tuple(sorted(set(layers)))
        self._budget_of, self._facts = budget_of, facts
        self._drawing: tuple[Tensor | None, int] = None, 0
        self.clock: Clock | None = None
        _check(adapter, self._cuts)
        self._hooks: list[Any] = []
        self._wanted = False
        self._expected: tuple[Placed, Tensor] | None = None
        self._run: LayerRun | None = None
        self._probes = ExitStack()
        self._decisions: list[LayerDecision] = []
        self._lengths: tuple[int, ...] = ()

    def __reduce_ex__(self, protocol: Any) -> Any:
        raise PatchError(
            "a patched model was to be copied or pickled, expected an unpatched one: the copy "
            "would share the patch; call vtc.unpatch(model) first"
        )

    @property
    def decisions(self) -> list[LayerDecision]:
        """What each cut of the last prefill left."""
        return list(self._decisions)

    @property
    def lengths(self) -> tuple[int, ...]:
        """Entries per decoder layer, padding included, once the last prefill was over."""
        return self._lengths

    @property
    def at(self) -> tuple[int, ...]:
        """The layers behind which is cut."""
        return self._cuts

    @property
    def run(self) -> LayerRun | None:
        """The run of the language model under way, where something is cut."""
        return self._run

    @property
    def cuts(self) -> bool:
        """Whether anything is cut."""
        return bool(self._cuts)

    def cut_after(self, layers: tuple[int, ...]) -> None:
        """Cut after these layers from the next call on."""
        cuts = tuple(sorted(set(layers)))
        if cuts == self._cuts:
            return
        _check(self._adapter, cuts)
        wanted = self._wanted
        self.detach()
        self._cuts = cuts
        if wanted:
            self.attach()

    def stage(self, layer: int) -> Stage | None:
        """Of the prefill under way, the entries that a layer sees; None where nothing is cut."""
        return None if self._run is None else self._run.stage(layer)

    def note_asking(self, layer: int, index: Tensor, valid: Tensor) -> None:
        """Say which entries alone issue queries in a layer of the run under way."""
        if self._run is not None:
            self._run.asking[layer] = (index, valid)

    @property
    def first_seen(self) -> int:
        """The first decoder layer that is looked at or changed; 0 without cuts."""
        if not self._cuts or self._method.drops_earlier_kv:
            return 0
        return self._cuts[0]

    def attach(self) -> None:
        """Register the hooks, behind those that are there and before their results."""
        self._wanted = True
        if self._hooks or not self._cuts:
            return
        first = 0 if self._method.drops_earlier_kv else self._cuts[0] + 1
        model = self._language_model
        self._hooks = [
            model.register_forward_pre_hook(self._before_language, with_kwargs=True),
            model.register_forward_hook(self._after_language, prepend=True, always_call=True),
            model.rotary_emb.register_forward_pre_hook(self._before_rotary, with_kwargs=True),
        ]
        for i, layer in enumerate(model.layers):
            if i >= first:
                hook = partial(self._before_layer, i)
                self._hooks.append(layer.register_forward_pre_hook(hook, with_kwargs=True))

    def owns(self, hook: Any) -> bool:
        """Whether a hook of a module within the language model is one of these."""
        own = hook.func if isinstance(hook, partial) else hook
        return own in (self._before_layer, self._before_rotary)

    def detach(self) -> None:
        """Remove the hooks and everything a broken-off call left."""
        self._wanted = False
        while self._hooks:
            self._hooks.pop().remove()
        self.clear()
        self._end()

    def expect(self, placed: Placed, mask: Tensor) -> None:
        """Say that the next run of the language model is the prefill of this sequence.

        Args:
            placed: where its visual tokens stand.
            mask: `[B, S]` over its entries, those that the cache does not hold yet.
        """
        self._decisions, self._lengths = [], ()
        self._expected = (placed, mask)

    def draw_by(self, image_key: Tensor | None, seed: int) -> None:
        """What methods that draw go by in the next prefill: `int64[G]`, a number made from the
        pixels of each image, and the seed."""
        self._drawing = image_key, seed

    def clear(self) -> None:
        """Forget a prefill that never came."""
        self._expected = None

    def _end(self) -> None:
        self._probes.close()
        self._run = None

    def _before_language(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> None:
        self._end()  # an interrupt runs no hook behind it
        expected, self._expected = self._expected, None
        given = kwargs
        if args:
            given = dict(zip(inspect.signature(module.forward).parameters, args)) | kwargs  # noqa: B905
        state = remembered(given.get("past_key_values"))
        if not self._cuts or (expected is None and state is None):
            return
        check_mode(module)
        first = 0 if self._method.drops_earlier_kv else 1
        recounted = None
        if self.recounts or (state is not None and state.shifts):
            recounted = Recounted(module.rotary_emb, state, self.recounts)
        run = LayerRun(self._language_model, self._cuts, first, state, given, recounted)
        if expected is not None:
            run.begin(*expected, self.decide, self.clock)
            for layer in self._cuts:
                attention = self._language_model.layers[layer].self_attn
                self._probes.enter_context(probed(attention, partial(run.see, layer)))
        self._run = run

    def _before_rotary(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> None:
        if self._run is not None and self._run.recounted is not None:
            names = inspect.signature(module.forward).parameters
            given = dict(zip(names, args)) | kwargs  # noqa: B905
            self._run.recounted.see(given["position_ids"])

    def _before_layer(
        self, layer: int, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        if self._run is None or self._run.over:
            return None
        given = kwargs
        if args:
            given = dict(zip(inspect.signature(module.forward).parameters, args)) | kwargs  # noqa: B905
        changed = self._run.inputs(layer, given)
        if changed is None:
            return None
        given = {**given, **changed}
        # by position, as gradient checkpointing wants it
        return (given.pop("hidden_states"),), given

    def decide(self, view: LayerView) -> Tensor | LayerCut:
        """What the method says of a view."""
        view = self._told(view)
        with torch.no_grad():
            keep = self._method.layer_cut(view, self._budget_of())
        return checked_cut(self._method.name, view, keep)

    def counts(self, view: LayerView) -> Tensor | None:
        """How many tokens of each image the method leaves of a view, where sizes alone tell."""
        return self._method.layer_counts(self._told(view), self._budget_of())

    def _told(self, view: LayerView) -> LayerView:
        image_key, seed = self._drawing
        norm = getattr(self._language_model, "norm", None)
        return replace(view, image_key=image_key, seed=seed, facts=self._facts, final_norm=norm)

    def _after_language(self, module: nn.Module, args: Any, output: Any) -> Any:
        run = self._run
        self._end()
        if run is None or output is None or not run.stages:
            return None
        self._decisions = run.decisions
        depth = len(self._language_model.layers)
        lengths = run.lengths()
        self._lengths = tuple(lengths[bisect_left(self._cuts, layer)] for layer in range(depth))
        run.keep_state(self._method.drops_earlier_kv)
        return run.restored(output)


def _check(adapter: Adapter, cuts: tuple[int, ...]) -> None:
    """Refuse layers that cannot be cut after."""
    model: Any = adapter.language_model
    depth, config = len(model.layers), model.config
    if cuts and not 0 <= cuts[0] <= cuts[-1] < depth - 1:
        raise SignalError(
            f"visual tokens were to be dropped after decoder layers {cuts}, expected layers "
            f"0..{depth - 2}: this language model has {depth}, and the last leaves nothing to save"
        )
    vision = getattr(adapter.model.config, "vision_config", None)
    added = len(getattr(vision, "deepstack_visual_indexes", None) or ())
    if cuts and cuts[0] + 1 < added:
        raise SignalError(
            f"visual tokens were to be dropped after decoder layer {cuts[0]}, expected layer "
            f"{added - 1} or later: this model adds encoder features to all visual tokens after "
            f"each of its first {added} decoder layers"
        )
    if cuts:
        check_full_attention(config)


def check_full_attention(config: Any) -> None:
    """Refuse a language model whose attention slides over a window."""
    types = getattr(config, "layer_types", None)
    window = getattr(config, "sliding_window", None)
    slides = any(kind != "full_attention" for kind in types) if types else window is not None
    if slides:
        raise UnsupportedModeError(
            f"this language model's attention slides over {window} entries, expected full "
            "attention in all layers: dropping tokens between them would move its window; choose a "
            "method that drops them before the language model"
        )


def check_mode(model: Any) -> None:
    """Refuse training with checkpoints: layers would run again, without their cache."""
    checkpoints = any(getattr(layer, "gradient_checkpointing", False) for layer in model.layers)
    if model.training and checkpoints:
        raise UnsupportedModeError(
            "the language model is in training mode with gradient checkpointing, expected one "
            "without on a model whose method drops tokens between decoder layers: call "
            "model.gradient_checkpointing_disable() or model.eval()"
        )
    if model.config.num_hidden_layers != len(model.layers):
        raise UnsupportedModeError(
            f"the language model is to run {model.config.num_hidden_layers} of its "
            f"{len(model.layers)} layers, expected all: pass no assistant_early_exit with a method "
            "that drops tokens between decoder layers"
        )
