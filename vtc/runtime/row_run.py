"""One run of a language model in which visual rows skip work, or are read otherwise."""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from vtc.errors import VtcError
from vtc.plans import LayerPlan, LayerRule
from vtc.runtime.layer_cache import filled
from vtc.runtime.layer_stage import Placed, Stage
from vtc.runtime.probe import implementation, intercepted
from vtc.runtime.reread import Reread, by_mask, visible_keys
from vtc.runtime.row_state import RowState, behind
from vtc.runtime.short_rows import FfnRows, ShortRows, Split, TextRows
from vtc.sites import RowView


@dataclass(frozen=True, eq=False)
class Expected:
    """The prefill that comes next.

    Attributes:
        placed: where its visual tokens stand.
        mask: `[B, S]` over its entries, those that the cache does not hold yet.
        cells: `int64[B, S, 3]`, the grid, row and column of each, grid -1 for text; None where the
            plan has no radius.
        image_key: `int64[G]`, a number made from the pixels of each image; None where it is not
            asked for.
        seed: the seed given to `vtc.patch`.
    """

    placed: Placed
    mask: Tensor
    cells: Tensor | None = None
    image_key: Tensor | None = None
    seed: int = 0


class Sequence:
    """The entries of a prefill as the layers up to the next cut see them.

    Args:
        visual: `bool[B, L]`.
        mask: `bool[B, L]`, False on padding.
        cells: `int64[B, L, 3]`, the grid, row and column of each, grid -1 for text; None where no
            radius is in force.
        places: where the tokens of each image stand.

    Attributes:
        split: text rows and visual rows.
        columns: `int64[G, N]`, where each visual token stands; 0 on padding.
        valid: `bool[G, N]`.
        parent: `int64[G, 2]`, image and batch row.
    """

    def __init__(
        self, visual: Tensor, mask: Tensor, cells: Tensor | None, places: Placed | Stage
    ) -> None:
        self.visual, self.mask, self._cells = visual, mask, cells
        self.valid = places.valid
        if isinstance(places, Stage):
            self.columns, self.parent = places.places, places.placed.parent
        else:
            self.columns, self.parent = places.columns, places.parent
        self.split = Split.of(visual, mask)
        self.empty = not self.split.visual.shape[1]

    @cached_property
    def _before(self) -> Tensor:
        """`bool[B, L]`, the entries up to the last visual one."""
        return self.visual.flip(-1).long().cumsum(-1).flip(-1) > 0

    @cached_property
    def tail(self) -> Split:
        """Entries behind the last visual one, as the text rows of a split."""
        return Split.of(self._before)

    @cached_property
    def tail_of_text(self) -> Split:
        """The same among the text rows alone."""
        return Split.of(self.split.texts(self._before) | ~self.split.text_valid)

    def near(self, radius: int, visual: Tensor) -> Tensor:
        """`bool[B, 1, L, held + L]`: text, and visual keys of the same grid within the radius.

        Args:
            radius: in rows and columns.
            visual: `bool[B, held + L]`, all visual keys.
        """
        if self._cells is None:
            raise VtcError(
                "a radius was put in force in a call of a model whose plan has none, expected it "
                "in the plan: say it in Method.plan, not in layer_rule"
            )
        grid, place = self._cells[..., 0], self._cells[..., 1:]
        apart = (place[:, :, None] - place[:, None]).abs().amax(-1)
        close = (grid[:, :, None] == grid[:, None]) & (apart <= radius)
        near = F.pad(close, (visual.shape[1] - close.shape[1], 0))
        return (near | ~visual[:, None])[:, None]


class RowRun:
    """One run of the language model: a prefill, or a step behind one.

    Args:
        plan: what was decided when the model was patched.
        state: what the cache remembers.
        given: the language model's inputs by name.

    Attributes:
        rules: of a prefill, those in force so far.
        asking: which entries issue queries in the layer under way: `(index, valid)`, `[k·B, R]`
            each; None: all.
    """

    def __init__(self, plan: LayerPlan, state: RowState | None, given: dict[str, Any]) -> None:
        entries = given.get("inputs_embeds")
        entries = given["input_ids"] if entries is None else entries
        self._batch, self._length = entries.shape[:2]
        self._state = state
        if state is not None:
            state.check(self._batch)
        self._cache = given.get("past_key_values")
        self._rules = list(plan.rules)
        self._placed: tuple[Tensor, Tensor, Tensor | None] | None = None
        self._where: Placed | None = None
        self._key: Tensor | None = None
        self._seed = 0
        self._rows = self._more = 0
        self._sequences: list[tuple[Stage | None, Sequence]] = []
        self._known: dict[int, tuple[LayerRule, Tensor]] = {}
        self._text: list[tuple[tuple[Sequence, Any, int, torch.device], TextRows]] = []
        self._short: ShortRows | None = None
        self.asking: tuple[Tensor, Tensor] | None = None

    @property
    def rules(self) -> tuple[LayerRule, ...]:
        """One for each decoder layer."""
        return tuple(self._rules)

    @property
    def is_prefill(self) -> bool:
        """Whether this run has the visual tokens among its entries."""
        return self._placed is not None

    def begin(self, expected: Expected) -> None:
        """Make it the prefill of a sequence."""
        placed, mask, cells = expected.placed, expected.mask, expected.cells
        self._where, self._key, self._seed = placed, expected.image_key, expected.seed
        self._rows, entries = mask.shape
        self._more = self._length - entries  # candidates of assisted decoding
        self._placed = (
            F.pad(placed.visual, (0, self._more)),
            F.pad(mask != 0, (0, self._more), value=True),
            None if cells is None else F.pad(cells, (0, 0, 0, self._more), value=-1),
        )

    def concerns(self, layer: int) -> bool:
        """Whether the layer is not left alone, as far as is known before it runs."""
        if self.is_prefill and not self._rules[layer].is_stock:
            return True
        rule = None if self._state is None else self._state.rules.get(layer)
        return rule is not None and rule.lasts

    def sequence(self, stage: Stage | None) -> Sequence:
        """The entries that a layer behind these cuts sees."""
        for known, sequence in self._sequences:
            if known is stage:
                return sequence
        visual, mask, cells = self._placed  # type: ignore[misc]  # a prefill has it
        places: Placed | Stage = self._where  # type: ignore[assignment]
        if stage is not None:
            places, visual, mask = stage, stage.visual, stage.mask
            if cells is not None:
                columns = stage.columns[..., None].expand(-1, -1, 3)
                cells = cells.to(columns.device).gather(1, columns)
        sequence = Sequence(visual, mask, cells, places)
        self._sequences.append((stage, sequence))
        return sequence

    def view(self, layer: int, sequence: Sequence, hidden: Tensor) -> RowView:
        """What a method may look at before a layer runs."""
        entries = sequence.visual.shape[1] - self._more
        copies = self._batch // self._rows
        here = hidden.device
        return RowView(
            layer=layer,
            hidden=hidden[::copies, :entries],
            mask=sequence.mask[:, :entries].to(here),
            visual=sequence.visual[:, :entries].to(here),
            valid=sequence.valid.to(here),
            columns=sequence.columns.to(here),
            parent=sequence.parent.to(here),
            image_key=self._key,
            seed=self._seed,
        )

    def refine(self, layer: int, rule: LayerRule) -> None:
        """Put a rule in force in this call."""

        def wide(x: Tensor | None) -> Tensor | None:
            return None if x is None else F.pad(x, (0, self._more))

        self._rules[layer] = replace(rule, unread=wide(rule.unread), sinks=wide(rule.sinks))

    def enter(
        self,
        layer: int,
        module: Any,
        sequence: Sequence | None,
        given: dict[str, Any],
        stack: ExitStack,
    ) -> dict[str, Any] | None:
        """Put what a layer needs on it until `stack` closes.

        Args:
            layer: the decoder layer.
            module: itself.
            sequence: of a prefill, its entries.
            given: its inputs by name.
            stack: what to undo.

        Returns:
            What it is to get in place of some inputs; None: nothing else.
        """
        self._short = self.asking = None
        if sequence is None:
            state = self._state
            if state is not None and self.concerns(layer):
                reread = Reread(state.rules[layer], state.visual[layer])
                stack.enter_context(intercepted(module.self_attn, reread.attend))
            return None
        held, rule = filled(given.get("past_key_values"), layer), self._rules[layer]
        whole, visual = rule, sequence.visual
        if held:
            whole, visual = behind(self._state, layer, held, rule, sequence.visual)
        if whole.lasts or whole.sinks is not None or whole.radius is not None:
            self._known[layer] = (whole, visual)
        changed, short = None, not rule.attention and not sequence.empty
        if short:
            changed = self._enter_short(module, sequence, given, rule.ffn, stack)
        elif not rule.ffn and not sequence.empty:
            split = self._here(sequence.split, given)
            stack.callback(FfnRows(module, split).close)
        if whole.rereads:
            radius = None if short else rule.radius
            reread = Reread(
                rule=whole,
                visual=visual,
                asking=None if short else sequence.split,
                near=None if radius is None else sequence.near(radius, visual),
                held=held,
                # flash attention takes none of four dimensions
                masked=short and implementation(module.self_attn) not in ("eager", "sdpa"),
                behind=sequence.tail_of_text if short else sequence.tail,
            )
            stack.enter_context(intercepted(module.self_attn, reread.attend))
        return changed

    def _here(self, split: Split, given: dict[str, Any]) -> Split:
        return split.to(given["hidden_states"].device).repeated(self._batch)

    def _enter_short(
        self,
        module: Any,
        sequence: Sequence,
        given: dict[str, Any],
        ffn: bool,
        stack: ExitStack,
    ) -> dict[str, Any]:
        """Have the layer run on text rows alone."""
        kind = implementation(module.self_attn)
        rows = self._text_rows(sequence, given, module.self_attn.layer_idx, kind == "eager")
        self._short = ShortRows(module, rows, given, ffn)
        stack.callback(self._short.close)
        self.asking = (rows.split.text, rows.split.text_valid)
        if kind not in ("eager", "sdpa"):
            # flash attention takes no such mask
            stack.enter_context(intercepted(module.self_attn, by_mask))
        return self._short.inputs

    def _text_rows(
        self, sequence: Sequence, given: dict[str, Any], layer: int, additive: bool
    ) -> TextRows:
        """The same object for layers that see the same entries, keys and mask."""
        hidden, mask = given["hidden_states"], given.get("attention_mask")
        queries = hidden.shape[1]
        keys = queries + filled(given.get("past_key_values"), layer)
        for (known, known_mask, known_keys, device), rows in self._text:
            same = known is sequence and known_mask is mask and known_keys == keys
            if same and device == hidden.device:
                return rows
        rows = TextRows.of(
            self._here(sequence.split, given),
            visible_keys(mask, queries, keys, hidden.device),
            given["position_embeddings"],
            hidden.dtype if additive else None,
        )
        self._text.append(((sequence, mask, keys, hidden.device), rows))
        return rows

    def leave(self, output: Any) -> Any:
        """The layer's output over all entries; None: as it is."""
        short, self._short = self._short, None
        return None if short is None else short.whole(output)

    def state(self) -> RowState:
        """What the cache is to remember."""
        rules = {} if self._state is None else dict(self._state.rules)
        visual = {} if self._state is None else dict(self._state.visual)
        for layer, (rule, keys) in self._known.items():
            visual[layer] = keys
            rules[layer] = replace(rule, attention=True, ffn=True, radius=None)
        return RowState(rules, visual, self._rows)
