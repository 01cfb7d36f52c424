"""One run of a language model between whose layers visual tokens are dropped, or were."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor

from vtc.entrance import Entrance, Heads
from vtc.errors import SignalError, UnsupportedModeError
from vtc.runtime.ahead import projected
from vtc.runtime.clock import Clock
from vtc.runtime.layer_bias import biased, check_biased, joined
from vtc.runtime.layer_cache import GroupMasks, LayerState, filled, remember
from vtc.runtime.layer_positions import Angles, Recounted
from vtc.runtime.layer_stage import LayerDecision, Placed, Stage, repeated
from vtc.sites import LayerCut, LayerView


class LayerRun:
    """One run of the language model: a prefill, or a step behind one.

    Args:
        model: the language model.
        cuts: the layers after which something may be dropped, ascending.
        first_group: the first group of layers that needs masks of its own in later steps.
        state: what the cache remembers.
        given: the language model's inputs by name.
        recounted: counts positions anew behind cuts; None: they are kept.

    Attributes:
        stages: of a prefill what each group of layers so far saw; of a later step none.
        decisions: of a prefill what each cut so far left.
        asking: the entries that alone issue queries in a layer: index and validity, `[k·B, R]`
            each.
        over: whether all layers have run, as one captured call.
        records: whether what every layer gives is wanted.
    """

    def __init__(
        self,
        model: Any,
        cuts: tuple[int, ...],
        first_group: int,
        state: LayerState | None,
        given: dict[str, Any],
        recounted: Recounted | None = None,
    ) -> None:
        self._config, self._layers = model.config, model.layers
        self.recounted = recounted
        self._cuts = cuts
        self._first_group = first_group
        self._state = state
        self._cache = given.get("past_key_values")
        embeds = given.get("inputs_embeds")
        entries = given["input_ids"] if embeds is None else embeds
        self._batch, self._new = entries.shape[:2]
        self._device = entries.device
        # one layer stands for its group
        layers = (0, *(cut + 1 for cut in cuts))
        self._before = tuple(filled(self._cache, layer) for layer in layers)
        static = bool(getattr(self._cache, "is_compileable", False))
        mask = given.get("attention_mask")
        self._masks = GroupMasks(state, mask, self._before, self._batch, self._new, static)
        self._embeds: Tensor | None = embeds
        self.stages: list[Stage] = []
        self.decisions: list[LayerDecision] = []
        self._seen: dict[int, tuple[Tensor, Tensor, Tensor, float]] = {}
        self._decide: Callable[[LayerView], Tensor | LayerCut] | None = None
        self._clock: Clock | None = None
        self.asking: dict[int, tuple[Tensor, Tensor]] = {}
        self._made: dict[tuple[int, torch.device], dict[str, Any]] = {}
        self.over = False
        wanted = ("output_hidden_states", "output_attentions")
        self.records = any(given.get(x, getattr(model.config, x, False)) for x in wanted)

    def begin(
        self,
        placed: Placed,
        mask: Tensor,
        decide: Callable[[LayerView], Tensor | LayerCut],
        clock: Clock | None = None,
    ) -> None:
        """Make it the prefill of a sequence; the clock is told what decisions take."""
        rows, entries = mask.shape
        if self._batch % rows or self._new < entries:
            raise UnsupportedModeError(
                f"the language model ran on {(self._batch, self._new)} entries, expected the whole "
                f"prompt of {(rows, entries)}, its rows repeated for beams: pass no "
                "prefill_chunk_size with a method that drops tokens between decoder layers"
            )
        self.stages.append(Stage.first(placed, mask.to(self._device), self._new))
        self._decide, self._clock = decide, clock

    def replayed(self, cache: Any) -> None:
        """Say that all layers have run as one captured call, which fills this cache."""
        self.over, self._cache = True, cache

    def stage(self, layer: int) -> Stage | None:
        """Of a prefill, the entries that a layer sees."""
        return self.stages[bisect_left(self._cuts, layer)] if self.stages else None

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
                with self.timed():
                    self.stages.append(self._cut(self._cuts[len(self.stages) - 1], hidden, given))
            if self.stages[group] is not self.stages[0]:
                stage = self.stages[group]
        if stage is None and (self._state is None or group < self._first_group):
            return None
        changed = {}
        if stage is not None and layer == self._cuts[group - 1] + 1:
            if stage.source is not self.stages[group - 1].source:
                with self.timed():
                    hidden = stage.take(hidden)
            changed["hidden_states"] = hidden
        where = (group, hidden.device)
        if where not in self._made:
            self._made[where] = self._make(layer, group, stage, hidden, given)
        return changed | self._made[where]

    def timed(self) -> AbstractContextManager[None]:
        """Within it is time that decisions take."""
        return nullcontext() if self._clock is None else self._clock.span("llm")

    def _make(
        self, layer: int, group: int, stage: Stage | None, hidden: Tensor, given: dict[str, Any]
    ) -> dict[str, Any]:
        """Mask and rotary angles of one group, on one device."""
        mask = self._causal(layer, group, stage, hidden)
        if (bias := self._bias(group, stage)) is not None:
            before, queries = self._before[group], hidden.shape[1]
            keys = before + queries
            if self._cache is not None:  # a static one attends over all of its slots
                keys = int(self._cache.get_mask_sizes(queries, layer)[0])
            check_biased(self._config._attn_implementation)
            mask = biased(mask, bias, before, keys, hidden)
        made: dict[str, Any] = {"attention_mask": mask}
        if (angles := self._turned(group, stage, hidden)) is not None:
            made["position_embeddings"] = angles
        if stage is not None:
            if angles is None and stage.columns is not self.stages[0].columns:
                made["position_embeddings"] = self._angles(group, stage, hidden, given)
            # rotary angles are all that is made of them; flash attention would read gaps in them
            # as the borders of packed sequences
            made["position_ids"] = None
        return made

    def _turned(self, group: int, stage: Stage | None, hidden: Tensor) -> Angles | None:
        """Cosines and sines at positions counted anew; None: at those that are given."""
        if self.recounted is None:
            return None
        # as it was made: `stage` may be a copy on another device
        made = self.stages[: group + 1]
        whole = not made or made[-1].columns is made[0].columns
        return self.recounted.angles(group, stage, whole, hidden)

    def _angles(self, group: int, stage: Stage, hidden: Tensor, given: dict[str, Any]) -> Angles:
        """Cosines and sines of the entries of a stage in the layers of a group."""
        if (turned := self._turned(group, stage, hidden)) is not None:
            return turned
        cosine, sine = given["position_embeddings"]
        return stage.rope(cosine, self._batch), stage.rope(sine, self._batch)

    def _causal(self, layer: int, group: int, stage: Stage | None, hidden: Tensor) -> Any:
        """What each entry may attend to, as the stock model says it."""
        from transformers.masking_utils import create_causal_mask

        new = None if stage is None else self._repeated(stage.to(hidden.device).mask)
        return create_causal_mask(
            config=self._config,
            inputs_embeds=hidden,
            attention_mask=self._masks.of(group, new),
            past_key_values=self._cache,
            layer_idx=layer,
        )

    def _bias(self, group: int, stage: Stage | None) -> Tensor | None:
        """What is added to attention on the entries of a group's layers: those that the cache held
        and, in a prefill, those of the stage."""
        held, length, before = None, 0, self._before[group]
        if self._state is not None:
            held, length = self._state.bias(group), self._state.lengths[group]
        parts = [(held, length), (None, before - length)]
        if stage is not None:
            new = None if stage.bias is None else self._repeated(stage.bias)
            parts.append((new, stage.entries))
        rows = next((bias for bias, _ in parts if bias is not None), None)
        return None if rows is None else joined(parts, rows)

    def _repeated(self, x: Tensor) -> Tensor:
        return repeated(x, self._batch // len(x))

    def _cut(self, layer: int, hidden: Tensor, given: dict[str, Any]) -> Stage:
        """The stage behind a layer that decides; `given` to the layer behind it."""
        if layer not in self._seen or self._decide is None:
            raise SignalError(
                f"the attention of decoder layer {layer} was not seen, expected it to look its "
                "implementation up in its config: use a stock transformers model"
            )
        view = self._view(layer, hidden, given)
        before = self.stages[-1]  # wherever it lies
        cut = self._decide(view)
        merged = before.to(view.query.device).merged(cut)
        after = before.cut(_moved(cut, before.mask.device))
        self.decisions.append(LayerDecision(layer, after.keep, after.entries, merged))
        return after

    def _view(self, layer: int, hidden: Tensor, given: dict[str, Any]) -> LayerView:
        """The sequence as a layer saw it that has run; `given` to the layer behind it."""
        query, key, value, scale = self._seen.pop(layer)
        stage = self.stages[-1].to(query.device)
        if layer in self.asking:
            query = _over_all(query, stage.entries, *self.asking.pop(layer))
        entries, group = stage.entries - stage.extra, len(self.stages) - 1
        heads = self._heads((query, key, value, scale), entries, group)
        return LayerView(
            layer=layer,
            valid=stage.valid,
            index=stage.index,
            columns=stage.places,
            parent=stage.placed.parent,
            tokens=stage.placed.tokens,
            mask=stage.mask[:, :entries],
            visual=stage.visual[:, :entries],
            query=heads.query,
            key=heads.key,
            value=heads.value,
            scale=scale,
            held=heads.held,
            newlines=stage.newlines,
            hidden=hidden[:: self._copies, :entries].to(query.device),
            entrance=partial(self._entrance, hidden, stage, given, group),
            ahead=partial(self._ahead, hidden, stage, given, group),
        )

    @property
    def _copies(self) -> int:
        """How often each row of the prompt is repeated, for beams."""
        return int(self._batch // len(self.stages[0].mask))

    def _heads(self, seen: tuple[Tensor, Tensor, Tensor, float], entries: int, group: int) -> Heads:
        """What an attention of some group of layers computed with, for the rows of the prompt.

        Keys and values of what its cache held stand before those of the entries.
        """
        query, key, value, scale = seen
        copies, held = self._copies, self._before[group]
        repeats = query.shape[1] // key.shape[1]
        key, value = (x[::copies, :, : held + entries] for x in (key, value))
        if repeats > 1:
            key, value = (x.repeat_interleave(repeats, 1) for x in (key, value))
        mask, _ = self._masks.held(group)
        return Heads(
            query=query[::copies, :, :entries],
            key=key,
            value=value,
            scale=scale,
            held=None if mask is None else mask[::copies].to(query.device),
        )

    def _entrance(
        self, hidden: Tensor, stage: Stage, given: dict[str, Any], group: int
    ) -> Entrance:
        """What the first layer got, on the device of the stage."""
        if self._embeds is None:
            raise UnsupportedModeError(
                "the language model was given ids, expected embeddings: images were given and "
                "their features are among them"
            )
        device, first = stage.mask.device, self.stages[0]
        whole, entries = first.length - first.extra, stage.entries - stage.extra
        angles = [
            x[..., :: self._copies, :entries, :].to(device)
            for x in self._angles(group, stage, hidden, given)
        ]
        return Entrance(
            embeds=self._embeds[:: self._copies, :whole].to(device),
            mask=first.mask[:, :whole].to(device),
            visual=first.visual[:, :whole].to(device),
            entry=stage.columns[:, :entries],
            angles=(angles[0], angles[1]),
        )

    def _ahead(
        self, hidden: Tensor, stage: Stage, given: dict[str, Any], group: int, rotary: bool
    ) -> Heads:
        """What the layer behind a group's would compute with if nothing were dropped."""
        cosine, sine = self._angles(group + 1, stage, hidden, given)
        if not rotary:
            cosine, sine = torch.ones_like(cosine), torch.zeros_like(sine)
        layer, before, cache = self._cuts[group] + 1, self._before[group + 1], self._cache
        held = cache.layers[layer] if before and cache is not None else None
        seen = projected(self._layers[layer], hidden, (cosine, sine), held, before)
        heads = self._heads(seen, stage.entries - stage.extra, group + 1)
        device = stage.mask.device
        query, key, value = (x.to(device) for x in (heads.query, heads.key, heads.value))
        there = None if heads.held is None else heads.held.to(device)
        return Heads(query, key, value, heads.scale, there)

    def lengths(self) -> tuple[int, ...]:
        """Entries that the layers of each group hold after a prefill."""
        stages = zip(self._before, self.stages, strict=True)
        return tuple(before + stage.entries for before, stage in stages)

    def keep_state(self, drops_earlier: bool) -> None:
        """Note on the cache what was dropped, if something was."""
        last, first = self.stages[-1], self.stages[0]
        if last is first or self._cache is None:
            return
        present = last.present
        # padding on the left was made anew: it moves nothing that stands behind
        gone = ~present & first.begun
        here = torch.arange(first.length, device=gone.device)
        # what stands behind is the same in all layers: neither dropped nor weighed
        for stage in self.stages:
            if stage.bias is not None:
                columns = stage.columns.masked_fill(stage.bias == 0, 0).to(here.device)
                gone = gone.scatter(1, columns, True)
        behind = first.length - 1 - int(here.masked_fill(~gone, -1).max())
        behind = min(behind, *(stage.entries for stage in self.stages))
        masks: list[Tensor | None] = []
        biases: list[Tensor | None] = []
        lengths = tuple(length - behind for length in self.lengths())
        for group, (stage, length) in enumerate(zip(self.stages, lengths, strict=True)):
            left = present.gather(1, stage.columns)
            new = stage.mask & left if drops_earlier else stage.mask
            mask = self._masks.of(group, self._repeated(new))
            mask = None if mask is None else mask[:, :length]
            masks.append(None if mask is None or bool(mask.all()) else mask)
            bias = self._bias(group, stage)
            biases.append(None if bias is None else bias[:, :length])
        shifts = () if self.recounted is None else self.recounted.shifts(self.stages, self._batch)
        state = LayerState(tuple(masks), lengths, self._batch, tuple(biases), shifts)
        remember(self._cache, state)

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


def _moved(cut: Tensor | LayerCut, device: torch.device) -> Tensor | LayerCut:
    if isinstance(cut, Tensor):
        return cut.to(device)
    size = None if cut.size is None else cut.size.to(device)
    keep, into, weight = (x.to(device) for x in (cut.keep, cut.into, cut.weight))
    return LayerCut(keep, into, weight, size)


def _over_all(query: Tensor, entries: int, index: Tensor, valid: Tensor) -> Tensor:
    """Queries `[B, H, R, d]` of some entries among all, NaN in the others."""
    out = query.new_full((*query.shape[:2], entries + 1, query.shape[3]), float("nan"))
    at = index.masked_fill(~valid, entries).to(query.device)[:, None, :, None]
    return out.scatter(2, at.expand_as(query), query)[:, :, :entries]
