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
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from vtc.adapters.base import Adapter
from vtc.errors import PatchError, SignalError, UnsupportedModeError, VtcError
from vtc.methods.base import Method
from vtc.runtime.attention_probe import probed
from vtc.runtime.layer_cache import GroupMasks, LayerState, filled, remember, remembered
from vtc.runtime.layer_stage import LayerDecision, Placed, Stage, repeated
from vtc.sites import LayerView
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
    ) -> None:
        self._language_model: Any = adapter.language_model
        self._method = method
        self._cuts = tuple(sorted(set(layers)))
        self._budget_of = budget_of
        _check(adapter, self._cuts)
        self._hooks: list[Any] = []
        self._expected: tuple[Placed, Tensor] | None = None
        self._run: _Run | None = None
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

    def attach(self) -> None:
        """Register the hooks, behind those that are there and before their results."""
        if self._hooks or not self._cuts:
            return
        first = 0 if self._method.drops_earlier_kv else self._cuts[0] + 1
        model = self._language_model
        self._hooks = [
            model.register_forward_pre_hook(self._before_language, with_kwargs=True),
            model.register_forward_hook(self._after_language, prepend=True, always_call=True),
        ]
        for i, layer in enumerate(model.layers):
            if i >= first:
                hook = partial(self._before_layer, i)
                self._hooks.append(layer.register_forward_pre_hook(hook, with_kwargs=True))

    def detach(self) -> None:
        """Remove the hooks and everything a broken-off call left."""
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
        _check_mode(module)
        first = 0 if self._method.drops_earlier_kv else 1
        run = _Run(self._language_model.config, self._cuts, first, state, given)
        if expected is not None:
            run.begin(*expected, self._decide)
            for layer in self._cuts:
                attention = self._language_model.layers[layer].self_attn
                self._probes.enter_context(probed(attention, partial(run.see, layer)))
        self._run = run

    def _before_layer(
        self, layer: int, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        if self._run is None:
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

    def _decide(self, view: LayerView) -> Tensor:
        with torch.no_grad():
            keep: Any = self._method.layer_cut(view, self._budget_of())
        wanted = tuple(view.valid.shape)
        if isinstance(keep, Tensor) and keep.dtype == torch.bool and keep.shape == wanted:
            return keep
        got = f"{keep.dtype} of {tuple(keep.shape)}" if isinstance(keep, Tensor) else type(keep)
        raise VtcError(
            f"method {self._method.name!r} decided {got} after decoder layer {view.layer}, "
            f"expected a tensor of bool of {wanted}: return one for the groups given to layer_cut"
        )

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


class _Run:
    """One run of the language model: a prefill, or a step behind one."""

    def __init__(
        self,
        config: Any,
        cuts: tuple[int, ...],
        first_group: int,
        state: LayerState | None,
        given: dict[str, Any],
    ) -> None:
        self._config = config
        self._cuts = cuts
        self._first_group = first_group
        self._state = state
        self._cache = given.get("past_key_values")
        entries = given.get("inputs_embeds")
        entries = given["input_ids"] if entries is None else entries
        self._batch, self._new = entries.shape[:2]
        self._device = entries.device
        # one layer stands for its group
        layers = (0, *(cut + 1 for cut in cuts))
        self._before = tuple(filled(self._cache, layer) for layer in layers)
        static = bool(getattr(self._cache, "is_compileable", False))
        mask = given.get("attention_mask")
        self._masks = GroupMasks(state, mask, self._before, self._batch, self._new, static)
        self.stages: list[Stage] = []
        self.decisions: list[LayerDecision] = []
        self._seen: dict[int, tuple[Tensor, Tensor, Tensor, float]] = {}
        self._decide: Callable[[LayerView], Tensor] | None = None
        self._made: dict[tuple[int, torch.device], dict[str, Any]] = {}

    def begin(self, placed: Placed, mask: Tensor, decide: Callable[[LayerView], Tensor]) -> None:
        """Make it the prefill of a sequence."""
        rows, entries = mask.shape
        if self._batch % rows or self._new < entries:
            raise UnsupportedModeError(
                f"the language model ran on {(self._batch, self._new)} entries, expected the whole "
                f"prompt of {(rows, entries)}, its rows repeated for beams: pass no "
                "prefill_chunk_size with a method that drops tokens between decoder layers"
            )
        self.stages.append(Stage.first(placed, mask.to(self._device), self._new))
        self._decide = decide

    def see(self, layer: int, query: Tensor, key: Tensor, value: Tensor, scale: float) -> None:
        """Note what a layer that decides computes with."""
        self._seen[layer] = (query.detach(), key.detach(), value.detach(), scale)

    def inputs(self, layer: int, given: dict[str, Any]) -> dict[str, Any] | None:
        """What a layer is to get in place of `given`; None: as it is."""
        hidden, group = given["hidden_states"], bisect_left(self._cuts, layer)
        self._cache = given.get("past_key_values")
        stage = None
        if self.stages:
            while len(self.stages) <= group:
                self.stages.append(self._cut(self._cuts[len(self.stages) - 1]))
            if self.stages[group] is not self.stages[0]:
                stage = self.stages[group]
        if stage is None and (self._state is None or group < self._first_group):
            return None
        changed = {}
        if stage is not None and layer == self._cuts[group - 1] + 1:
            if stage is not self.stages[group - 1]:
                hidden = stage.take(hidden)
            changed["hidden_states"] = hidden
        where = (group, hidden.device)
        if where not in self._made:
            self._made[where] = self._make(layer, group, stage, hidden, given)
        return changed | self._made[where]

    def _make(
        self, layer: int, group: int, stage: Stage | None, hidden: Tensor, given: dict[str, Any]
    ) -> dict[str, Any]:
        """Mask and rotary angles of one group, on one device."""
        from transformers.masking_utils import create_causal_mask

        new = None if stage is None else self._repeated(stage.to(hidden.device).mask)
        mask = create_causal_mask(
            config=self._config,
            inputs_embeds=hidden,
            attention_mask=self._masks.of(group, new),
            past_key_values=self._cache,
            layer_idx=layer,
        )
        made: dict[str, Any] = {"attention_mask": mask}
        if stage is not None:
            angles = given["position_embeddings"]
            made["position_embeddings"] = tuple(stage.rope(x, self._batch) for x in angles)
            # rotary angles are all that is made of them; flash attention would read gaps in them
            # as the borders of packed sequences
            made["position_ids"] = None
        return made

    def _repeated(self, x: Tensor) -> Tensor:
        return repeated(x, self._batch // len(x))

    def _cut(self, layer: int) -> Stage:
        """The stage behind a layer that decides."""
        if layer not in self._seen or self._decide is None:
            raise SignalError(
                f"the attention of decoder layer {layer} was not seen, expected it to look its "
                "implementation up in its config: use a stock transformers model"
            )
        query, key, value, scale = self._seen.pop(layer)
        stage = self.stages[-1].to(query.device)
        copies = self._batch // len(stage.mask)
        entries = stage.entries - stage.extra
        held = self._before[len(self.stages) - 1] + entries
        heads = query.shape[1] // key.shape[1]
        view = LayerView(
            layer=layer,
            valid=stage.valid,
            index=stage.index,
            columns=stage.places,
            parent=stage.placed.parent,
            tokens=stage.placed.tokens,
            mask=stage.mask[:, :entries],
            visual=stage.visual[:, :entries],
            query=query[::copies, :, :entries],
            key=key[::copies, :, :held].repeat_interleave(heads, 1),
            value=value[::copies, :, :held].repeat_interleave(heads, 1),
            scale=scale,
        )
        before = self.stages[-1]  # wherever it lies
        after = before.cut(self._decide(view).to(before.mask.device))
        self.decisions.append(LayerDecision(layer, after.keep, after.entries))
        return after

    def lengths(self) -> tuple[int, ...]:
        """Entries that the layers of each group hold after a prefill."""
        stages = zip(self._before, self.stages, strict=True)
        return tuple(before + stage.entries for before, stage in stages)

    def keep_state(self, drops_earlier: bool) -> None:
        """Note on the cache what was dropped, if something was."""
        last, first = self.stages[-1], self.stages[0]
        if last is first or self._cache is None:
            return
        present, masks = last.present, []
        for group, stage in enumerate(self.stages):
            left = present.gather(1, stage.columns)
            new = stage.mask & left if drops_earlier else stage.mask
            mask = self._masks.of(group, self._repeated(new))
            masks.append(None if mask is None or bool(mask.all()) else mask)
        dropped = first.mask & ~present
        here = torch.arange(first.length, device=dropped.device)
        spare = first.length - 1 - int(here.masked_fill(~dropped, -1).max())
        remember(self._cache, LayerState(tuple(masks), self.lengths(), self._batch, spare))

    def restored(self, output: Any) -> Any:
        """The output of the language model over all its entries."""
        last = self.stages[-1]
        if last is self.stages[0]:
            return output
        if isinstance(output, tuple):
            return (last.restore(output[0]), *output[1:])
        output.last_hidden_state = last.restore(output.last_hidden_state)
        states = getattr(output, "hidden_states", None)
        if states is not None:
            output.hidden_states = tuple(map(self._restored_state, range(len(states)), states))
        return output

    def _restored_state(self, at: int, hidden: Tensor | None) -> Tensor | None:
        """Of the first layer's input and all layers' outputs one, over all entries."""
        stage = self.stages[bisect_left(self._cuts, max(at - 1, 0))]
        if hidden is None or stage is self.stages[0]:
            return hidden
        return stage.restore(hidden)


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
    types = getattr(config, "layer_types", None)
    window = getattr(config, "sliding_window", None)
    slides = any(kind != "full_attention" for kind in types) if types else window is not None
    if cuts and slides:
        raise UnsupportedModeError(
            f"this language model's attention slides over {window} entries, expected full "
            "attention in all layers: dropping tokens between them would move its window; choose a "
            "method that drops them before the language model"
        )


def _check_mode(model: Any) -> None:
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
