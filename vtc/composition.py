"""Several methods on one model: `vtc.compose(("flowcut", 0.5), ("todre", 0.1))`."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from functools import reduce
from operator import and_
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from vtc.errors import InputError, OptionError, UnsupportedModeError
from vtc.methods.base import Exactness, Method, Site, Step
from vtc.methods.none import NoCompression
from vtc.methods.registry import method as build_method
from vtc.plans import LayerPlan, LayerRule
from vtc.selectors import Count
from vtc.sites import BlockView, Cut, Facts, LayerCut, LayerView, RowView, checked_cut
from vtc.steps import decisions
from vtc.types import Budget, Selection, Signal, Tokens

_ORDER: dict[Site, str] = {
    "encoder": "inside the encoder",
    "llm_input": "before the LLM",
    "llm_layer": "between decoder layers",
    "llm_rows": "on visual rows in decoder layers",
}


def compose(*stages: str | Method | tuple[Any, ...]) -> Composed:
    """One method that has several act one after the other.

    Args:
        stages: each `(method, keep)` or `(name, keep, {options})`, or a name or `Method` alone
            where it takes no keep, in the order in which they act: inside the encoder, before the
            LLM, between its layers, on visual rows in its layers. Each `keep` is relative to the
            tokens that the image had in the beginning and must not rise from stage to stage; that
            of a method on rows is its share of layers.

    Raises:
        OptionError: no such method or option, another order, keeps that rise, or stages that
            cannot stand behind each other.
    """
    steps: list[Step] = []
    for stage in stages:
        given = stage if isinstance(stage, tuple) else (stage,)
        keep, options = given[1] if len(given) > 1 else None, given[2] if len(given) > 2 else {}
        if len(given) not in (1, 2, 3) or not isinstance(options, Mapping):
            raise OptionError(
                f"compose got stage {stage!r}, expected (method, keep), (name, keep, "
                "{options}), or a name or method alone"
            )
        made = build_method(given[0], **options)
        _check_kind(made)
        budget = made.check_keep(keep)
        steps += made.steps(budget)
    return Composed(stages=tuple(steps))


@dataclass(frozen=True, kw_only=True, repr=False)
class Composed(Method):
    """Methods that act one after the other, each on what the one before left. See `compose`.

    Tokens that an earlier stage dropped are not there for a later one: it sees the others moved
    together, as a row without a grid, and attention of encoder blocks among them. What it says is
    told in the image's original tokens again. A stage whose keep leaves every image of a call whole
    is not run in it. FlowCut's cut in the LLM goes by FlowCut's own keep. Where one stage drops
    earlier caches, all that any cut between layers dropped is no longer read.

    Args:
        stages: the methods and how much they keep.
        facts: the model on which it decides, see `on`.
    """

    stages: tuple[Step, ...] = ()
    facts: Facts | None = field(default=None, compare=False)

    count: ClassVar[Count] = "adaptive"

    def __post_init__(self) -> None:
        if not self.stages:
            raise OptionError("compose got no stages, expected at least one: ('vtc_cls', 0.11)")
        super().__post_init__()
        for step in self.stages:
            _check_kind(step.method)
        _check_order(self.stages)
        _check_grids(self.stages)
        _check_keeps(self._counted)

    @property
    def name(self) -> str:  # type: ignore[override]  # the rest of the package only reads these
        """The names of the stages."""
        return "+".join(step.method.name for step in self.stages)

    @property
    def summary(self) -> str:  # type: ignore[override]
        """One line."""
        return ", then ".join(step.method.summary for step in self.stages)

    @property
    def site(self) -> Site:  # type: ignore[override]
        """Where the first stage acts."""
        return self.stages[0].method.site

    @property
    def exactness(self) -> Exactness:  # type: ignore[override]
        """The weakest of the stages'."""
        found = {step.method.exactness for step in self.stages}
        weakest: tuple[Exactness, ...] = ("restatement", "layer_mask", "mask")
        return next(kind for kind in weakest if kind in found)

    @property
    def published_positions(self) -> Literal["keep", "renumber", "median"]:  # type: ignore[override]
        """What the stages that drop tokens agree on, else `"keep"`."""
        dropping = [s.method for s in self.stages if s.method.site != "llm_rows"]
        found = {method.published_positions for method in dropping}
        return found.pop() if len(found) == 1 else "keep"

    def published_between(self, facts: Facts) -> Literal["keep", "renumber"]:
        """What the stages that cut between decoder layers agree on, else `"keep"`."""
        cutting = [s.method for s in self.stages if s.method.llm_layers(facts, s.budget)]
        found = {method.published_between(facts) for method in cutting}
        return found.pop() if len(found) == 1 else "keep"

    @property
    def bibtex(self) -> str:  # type: ignore[override]
        """How to cite the stages."""
        entries = [step.method.bibtex for step in self.stages]
        return "\n\n".join(dict.fromkeys(filter(None, entries)))

    def __repr__(self) -> str:
        stages = ", ".join(f"({step.method!r}, {step.budget.keep!r})" for step in self.stages)
        return f"compose({stages})"

    @property
    def _counted(self) -> list[Step]:
        """The stages that say how many tokens are kept."""
        return [s for s in self.stages if s.method.site != "llm_rows" and s.budget.keep is not None]

    @property
    def needs(self) -> tuple[Signal, ...]:
        """What the stages need."""
        return tuple(dict.fromkeys(need for step in self.stages for need in step.method.needs))

    def check_keep(self, keep: float | int | None) -> Budget:
        """Only None: the stages have their own."""
        if keep is not None:
            raise OptionError(
                f"method {self.name!r} is a composition and got keep={keep!r}, expected none: its "
                "stages carry their own; compose it anew with other keeps"
            )
        return Budget(None)

    def keeps_all(self, budget: Budget, lengths: Iterable[int]) -> bool:
        """Whether no stage changes anything."""
        given = tuple(lengths)
        return all(step.keeps_all(given) for step in self.stages)

    def steps(self, budget: Budget) -> tuple[Step, ...]:
        """The stages."""
        return self.stages

    def on(self, facts: Facts) -> Composed:
        """With stages that know the model."""
        stages = tuple(replace(step, method=step.method.on(facts)) for step in self.stages)
        return replace(self, stages=stages, facts=facts)

    def check_lengths(self, lengths: tuple[int, ...]) -> None:
        """Refuse fractions and numbers of tokens that rise on one of these images."""
        for image, n in enumerate(lengths):
            for before, after in zip(self._counted, self._counted[1:], strict=False):
                first, then = before.budget.count(n), after.budget.count(n)
                if then > first:
                    raise InputError(
                        f"image {image} of the call has {n} tokens: stage {_said(before)} keeps "
                        f"{first} of them and stage {_said(after)} behind it {then}, expected at "
                        "most as many: give both as fractions, or both in tokens"
                    )

    def check_facts(self, facts: Facts) -> None:
        """Every stage can work on the model."""
        for step in self.stages:
            step.method.check_facts(facts)

    def encoder_blocks(self, facts: Facts) -> tuple[int, ...]:
        """Those of the stage inside the encoder."""
        found = [step.method.encoder_blocks(facts) for step in self.stages]
        return tuple(sorted({block for blocks in found for block in blocks}))

    def encoder_cut(self, view: BlockView, budget: Budget) -> Cut:
        """What the stage inside the encoder decides."""
        step = self.stages[0]
        return step.method.encoder_cut(view, step.budget)

    def llm_layers(self, facts: Facts, budget: Budget | None = None) -> tuple[int, ...]:
        """The decoder layers that any stage looks at."""
        found = [step.method.llm_layers(facts, step.budget) for step in self.stages]
        return tuple(sorted({layer for layers in found for layer in layers}))

    def layer_cut(self, view: LayerView, budget: Budget) -> Tensor | LayerCut:
        """What the stages that look at this layer leave, one after the other."""
        last: Tensor | LayerCut = view.valid
        for step in self.stages:
            layers = step.method.llm_layers(self._model, step.budget)
            if view.layer in layers and not step.keeps_all(view.tokens):
                if isinstance(last, LayerCut) and last.merges:
                    raise UnsupportedModeError(
                        f"method {step.method.name!r} was to choose after decoder layer "
                        f"{view.layer} among tokens that a stage before it merges there, expected "
                        "one that merges to be the last at its layer: choose other layers"
                    )
                last = step.method.layer_cut(view, step.budget)
                last = checked_cut(step.method.name, view, last)
                view = view.narrowed(last.keep if isinstance(last, LayerCut) else last)
        if not isinstance(last, LayerCut):
            return view.valid
        return replace(last, keep=view.valid)

    def plan(self, layers: Tokens, facts: Facts, budget: Budget) -> LayerPlan:
        """All plans at once."""
        return reduce(and_, (s.method.plan(layers, facts, s.budget) for s in self.stages))

    def rule_layers(self, facts: Facts) -> tuple[int, ...]:
        """The decoder layers whose rule any stage completes."""
        found = [step.method.rule_layers(facts) for step in self.stages]
        return tuple(sorted({layer for layers in found for layer in layers}))

    def layer_rule(self, view: RowView, rule: LayerRule) -> LayerRule:
        """The rule completed by one stage after the other."""
        for step in self.stages:
            if view.layer in step.method.rule_layers(self._model):
                rule = _both(rule, step.method.layer_rule(view, rule))
        return rule

    @property
    def drops_earlier_kv(self) -> bool:
        """Whether any stage does."""
        return any(step.method.drops_earlier_kv for step in self.stages)

    def select(self, tokens: Tokens, budget: Budget) -> Selection:
        """What the stages before the LLM leave."""
        steps = [step for step in self.stages if step.method.site == "llm_input"]
        found = decisions(steps, lambda method, left: tokens)
        if found:
            return found[-1]
        return Selection.everything(tokens.lengths, tokens.parent, tokens.grid, tokens.parts)

    @property
    def _model(self) -> Facts:
        if self.facts is None:
            raise OptionError(
                f"method {self.name!r} was asked about a decoder layer of no model, expected "
                "on(facts) first"
            )
        return self.facts


def _said(step: Step) -> str:
    return f"{step.method.name!r} (keep={step.budget.keep})"


def _both(before: LayerRule, after: LayerRule) -> LayerRule:
    """`after` with what it does not say of `before`: tokens that are not read add up."""
    if before.redistribution is not None and after.sinks is not before.sinks:
        raise OptionError(
            "two stages redistribute the attention of the same layer, expected one: leave one out"
        )
    if before.unread is None or after.unread is None:
        return replace(after, unread=before.unread if after.unread is None else after.unread)
    return replace(after, unread=torch.logical_or(before.unread, after.unread))


def _check_kind(method: Method) -> None:
    if isinstance(method, NoCompression):
        raise OptionError(
            f"compose got method {method.name!r}, which keeps everything, expected one that does "
            "something: leave it out"
        )
    if method.site == "pixels":
        raise OptionError(
            f"compose got method {method.name!r}, which makes the picture itself smaller, expected "
            "methods that act in the model: patch with it alone, or resize the picture before the "
            "processor sees it"
        )


def _check_order(stages: tuple[Step, ...]) -> None:
    order = list(_ORDER)
    places = [order.index(step.method.site) for step in stages]
    if places != sorted(places):
        wanted = [step.method.name for _, step in sorted(enumerate(stages), key=_by(places))]
        said = "; ".join(f"{s.method.name!r} acts {_ORDER[s.method.site]}" for s in stages)
        raise OptionError(
            f"compose got stages in the order {' '.join(s.method.name for s in stages)}, expected "
            f"that in which they act: {said}; write them as {', '.join(wanted)}"
        )
    inside = [step.method.name for step in stages if step.method.site == "encoder"]
    if len(inside) > 1:
        raise OptionError(
            f"compose got stages {' and '.join(inside)}, which both cut inside the encoder, "
            "expected at most one that does: leave one out"
        )


def _by(places: list[int]) -> Any:
    return lambda pair: places[pair[0]]


def _check_grids(stages: tuple[Step, ...]) -> None:
    """Refuse stages that would choose among merged tokens, or look for a grid behind a cut."""
    before: list[Step] = []
    for step in (s for s in stages if s.method.site in ("encoder", "llm_input")):
        if before and step.method.needs_grid:
            raise OptionError(
                f"compose got method {step.method.name!r} behind {before[-1].method.name!r}, but "
                "it needs the whole grid of tokens and some of it is gone by then: put it first, "
                "without another stage that drops tokens before the LLM, or leave it out"
            )
        merged = [s.method.name for s in before if _merges(s.method)]
        if merged:
            raise OptionError(
                f"compose got method {step.method.name!r} behind {merged[0]!r}, which merges "
                "tokens, expected it to choose among the encoder's own: put the stage that merges "
                "last of those before the LLM, or leave it out"
            )
        before.append(step)


def _merges(method: Method) -> bool:
    return method.site == "llm_input" and method.exactness == "restatement"


def _check_keeps(counted: list[Step]) -> None:
    for i, after in enumerate(counted):
        for before in counted[:i]:
            first, then = before.budget.keep, after.budget.keep
            if type(first) is type(then) and then > first:  # type: ignore[operator]
                raise OptionError(
                    f"compose got stage {_said(after)} behind stage {_said(before)}, expected at "
                    "most as much: keeps are relative to all tokens that an image had in the "
                    f"beginning; pass at most {first} there"
                )
