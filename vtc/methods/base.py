"""What a method is: one paper, one frozen dataclass, composed of a scorer and a selector."""

from __future__ import annotations

import numbers
from collections.abc import Iterable
from dataclasses import dataclass, fields, replace
from typing import Any, ClassVar, Literal, get_type_hints

import torch
from huggingface_hub.dataclasses import type_validator
from torch import Tensor

from vtc.errors import OptionError
from vtc.plans import LayerPlan, LayerRule
from vtc.scorers import SCORERS, Scorer
from vtc.selectors import SELECTORS, Count, Selector
from vtc.sites import BlockView, Cut, Facts, LayerCut, LayerView, RowView
from vtc.types import Budget, Selection, Signal, Tokens

Site = Literal["pixels", "encoder", "llm_input", "llm_layer", "llm_rows"]
Exactness = Literal["mask", "layer_mask", "restatement"]
Positions = Literal["keep", "renumber", "median", "published"]


@dataclass(frozen=True, kw_only=True)
class Method:
    """Base of all methods. Fields are options: typed, validated, printable.

    Args:
        scorer: replaces the method's own scorer: an object, or a name such as `"random"`.
        selector: replaces the method's own selector: an object, or a name such as `"top_k"`.

    Attributes:
        name: what users write in `vtc.patch(model, method=name)`; by default the class's name.
        summary: one line for `vtc.methods()`.
        site: where the first choice acts: `"pixels"` (before the encoder), `"encoder"` (between its
            blocks), `"llm_input"` (before the LLM), `"llm_layer"` (between its layers) or
            `"llm_rows"` (in its layers, without dropping tokens, see `plan`). A method may cut
            between decoder layers besides, see `llm_layers`.
        count: whether `keep` is met exactly, is an upper bound, or is the method's own affair.
        exactness: what the patched model equals, see the contract: `"mask"`, `"layer_mask"` or
            `"restatement"`.
        bibtex: how to cite it.
        published_positions: what `positions="published"` means for what reaches the LLM.
    """

    name: ClassVar[str]
    summary: ClassVar[str] = ""
    site: ClassVar[Site] = "llm_input"
    count: ClassVar[Count] = "exact"
    exactness: ClassVar[Exactness] = "mask"
    published_positions: ClassVar[Literal["keep", "renumber", "median"]] = "renumber"
    bibtex: ClassVar[str] = ""

    scorer: Scorer | str | None = None
    selector: Selector | str | None = None

    def __init_subclass__(cls, abstract: bool = False) -> None:
        super().__init_subclass__()
        if "name" not in vars(cls) and not abstract:
            cls.name = cls.__name__

    def __post_init__(self) -> None:
        hints = get_type_hints(type(self))
        for option in fields(self):
            hint = hints[option.name]
            value = _plain(getattr(self, option.name), hint)
            object.__setattr__(self, option.name, value)
            try:
                if isinstance(value, bool) and hint in (int, float):
                    raise TypeError(f"Field {option.name!r} expected {hint.__name__}, got bool")
                type_validator(option.name, value, hint)
            except TypeError as error:
                message = " ".join(str(error).split())
                raise OptionError(f"method {self.name!r}: {message}") from None
        object.__setattr__(self, "scorer", self._swap(self.scorer, SCORERS, "scorer"))
        object.__setattr__(self, "selector", self._swap(self.selector, SELECTORS, "selector"))
        self._check_parts()

    def expect(self, holds: bool, expected: str, *options: str) -> None:
        """Raise `OptionError` that says what these options are and what was `expected`, unless it
        `holds`."""
        if not holds:
            got = ", ".join(f"{option}={getattr(self, option)!r}" for option in options)
            raise OptionError(f"method {self.name!r} got {got}, expected {expected}")

    def _swap(self, given: Any, table: dict[str, Any], what: str) -> Any:
        if not isinstance(given, str):
            return given
        if given not in table:
            raise OptionError(
                f"method {self.name!r}: {what} {given!r} is unknown; expected one of "
                f"{sorted(table)}"
            )
        return table[given]()

    @property
    def _composed(self) -> bool:
        """Whether a scorer and a selector decide, rather than a rule of the method's own."""
        chooses = self.site in ("pixels", "llm_input")
        return chooses and type(self).select is Method.select

    def _check_parts(self) -> None:
        """Refuse a swapped scorer or selector that would be ignored or cannot work."""
        if not self._composed:
            if self.scorer is not None or self.selector is not None:
                raise OptionError(
                    f"method {self.name!r} got a scorer or selector, expected none: it decides by "
                    "a rule of its own"
                )
            return
        try:
            selector = self.active_selector
        except OptionError as error:
            # a part knows its own name and option, who wrote them knows the method's
            raise OptionError(f"method {self.name!r}: {error}") from None
        # a method that counts by itself may tell its selector how many
        wanted = self.default_selector().count if self.count == "adaptive" else self.count
        if self.selector is not None and selector.count != wanted:
            raise OptionError(
                f"method {self.name!r} got selector {selector.name!r}, which keeps "
                f"{selector.count!r} of the budget, expected one that keeps {wanted!r}"
            )
        if selector.uses_scores and self.active_scorer is None:
            raise OptionError(
                f"method {self.name!r} got selector {selector.name!r} and no scorer, expected one: "
                f"pass scorer=..., one of {sorted(SCORERS)} or an object"
            )
        if self.scorer is not None and not selector.uses_scores:
            raise OptionError(
                f"method {self.name!r} got a scorer, expected none: its selector "
                f"{selector.name!r} looks at no scores"
            )

    def default_scorer(self) -> Scorer | None:
        """The scorer as published; None for methods that need none."""
        return None

    def default_selector(self) -> Selector:
        """The selector as published."""
        raise NotImplementedError(f"{type(self).__name__} must define default_selector or select")

    @property
    def active_scorer(self) -> Scorer | None:
        """The scorer in use: the one given, else the published one."""
        own = self.default_scorer()
        return self.scorer.around(own) if isinstance(self.scorer, Scorer) else own

    @property
    def active_selector(self) -> Selector:
        """The selector in use: the one given, else the published one."""
        return self.selector if isinstance(self.selector, Selector) else self.default_selector()

    @property
    def needs(self) -> tuple[Signal, ...]:
        """What the runtime must capture for `select`."""
        scorer, selector = self.active_scorer, self.active_selector if self._composed else None
        needs = () if selector is None else selector.needs
        if scorer is None or (selector is not None and not selector.uses_scores):
            return needs
        return tuple(dict.fromkeys((*scorer.needs, *needs)))

    @property
    def needs_grid(self) -> bool:
        """Whether it looks at how tokens lie in a grid, so that none may be gone before it."""
        if not self._composed:
            return False
        scorer = self.active_scorer if self.active_selector.uses_scores else None
        return self.active_selector.needs_grid or (scorer is not None and scorer.needs_grid)

    def check_keep(self, keep: float | int | None) -> Budget:
        """The budget for this method; raises `OptionError` where `keep` makes no sense for it."""
        if keep is None and self.count != "adaptive":
            raise OptionError(
                f"method {self.name!r} got keep=None, expected how much is kept: pass a float in "
                "(0, 1] for a fraction or an int >= 1 for tokens per image"
            )
        if keep is not None and self.count == "adaptive":
            raise OptionError(
                f"method {self.name!r} decides by itself how much is kept and got keep={keep!r}; "
                f"leave keep out"
            )
        budget = Budget.of(keep)
        if self.site == "llm_rows" and isinstance(budget.keep, int):
            raise OptionError(
                f"method {self.name!r} skips work in decoder layers and got keep={keep!r} tokens, "
                "expected a float in (0, 1]: the share of layers in which visual rows stay active"
            )
        return budget

    def keeps_all(self, budget: Budget, lengths: Iterable[int]) -> bool:
        """Whether it would change nothing about images of so many tokens: then it is not run."""
        if self.site == "llm_rows":
            return budget.keep == 1.0
        return budget.keeps_all(lengths)

    def steps(self, budget: Budget) -> tuple[Step, ...]:
        """What decides, in order: the method itself, or the stages of a composition."""
        return (Step(self, budget),)

    def published_between(self, facts: Facts) -> Literal["keep", "renumber"]:
        """What `positions="published"` means on such a model behind cuts between decoder layers."""
        return "keep"

    def on(self, facts: Facts) -> Method:
        """The method as it decides on such a model: itself, unless a part must know the model."""
        if not self._composed:
            return self
        known: dict[str, Any] = {}
        selector, scorer = self.active_selector, self.active_scorer
        if (found := selector.on(facts)) is not selector:
            known["selector"] = found
        if scorer and selector.uses_scores and (told := scorer.on(facts)) is not scorer:
            known["scorer"] = told
        return replace(self, **known) if known else self

    def check_lengths(self, lengths: tuple[int, ...]) -> None:
        """Raise `InputError` where it cannot decide over images of so many tokens."""
        return None

    def check_facts(self, facts: Facts) -> None:
        """Raise `SignalError` where the method cannot work on such a model."""
        return None

    def encoder_blocks(self, facts: Facts) -> tuple[int, ...]:
        """The encoder blocks whose attention `encoder_cut` sees; none by default."""
        return ()

    def encoder_cut(self, view: BlockView, budget: Budget) -> Cut:
        """Decide which units go on after one of `encoder_blocks`."""
        raise NotImplementedError(f"{type(self).__name__} must define encoder_cut")

    def llm_layers(self, facts: Facts, budget: Budget | None = None) -> tuple[int, ...]:
        """The decoder layers whose attention `layer_cut` sees; none by default."""
        return ()

    def layer_cut(self, view: LayerView, budget: Budget) -> Tensor | LayerCut:
        """Decide which visual tokens `bool[G, N]` go on after one of `llm_layers`, or what others
        become of them."""
        raise NotImplementedError(f"{type(self).__name__} must define layer_cut")

    def layer_counts(self, view: LayerView, budget: Budget) -> Tensor | None:
        """How many tokens of each group `layer_cut` leaves, `int64[G]` on the CPU, where sizes
        tell; None: what it sees does."""
        return None

    def capture_refusal(self) -> str | None:
        """Why `layer_cut` cannot be part of what is captured; None: it reads nothing off the device
        where a view knows its `lengths`."""
        return "the method decides between decoder layers by what they see"

    def plan(self, layers: Tokens, facts: Facts, budget: Budget) -> LayerPlan:
        """Decide what visual rows do in each decoder layer, when the model is patched.

        Args:
            layers: one group of L tokens, the decoder layers, without features: what scorers and
                selectors choose among. Add the signals that the scorer needs.
            facts: of the model.
            budget: the share of decoder layers in which visual rows stay active.
        """
        return LayerPlan.stock(facts.llm_depth)

    def rule_layers(self, facts: Facts) -> tuple[int, ...]:
        """The decoder layers whose input `layer_rule` sees; none by default."""
        return ()

    def layer_rule(self, view: RowView, rule: LayerRule) -> LayerRule:
        """The rule of one of `rule_layers` in this call, from the plan's."""
        return rule

    @property
    def drops_earlier_kv(self) -> bool:
        """Whether decoder layers before a cut stop reading what was cut, once the prefill is over.

        By default they go on reading it.
        """
        return False

    def counts(self, tokens: Tokens, scores: Tensor | None, budget: Budget) -> Tensor:
        """How many tokens of each group the selector is asked for, `int64[G]` on the CPU; all, of
        one that counts by itself."""
        if budget.keep is None and self.active_selector.count == "adaptive":
            return torch.tensor(tokens.lengths)
        return budget.counts(tokens.lengths, tokens.parent)

    def select(self, tokens: Tokens, budget: Budget) -> Selection:
        """Decide which tokens of each group reach the LLM (not called at the encoder site)."""
        selector, scorer = self.active_selector, self.active_scorer
        scores = scorer(tokens) if scorer and selector.uses_scores else None
        return selector(tokens, scores, self.counts(tokens, scores, budget))


@dataclass(frozen=True)
class Step:
    """A method and how much it keeps.

    Attributes:
        method: decides.
        budget: of each image's tokens in the stock model, whatever a step before left.
    """

    method: Method
    budget: Budget

    def keeps_all(self, lengths: Iterable[int]) -> bool:
        """Whether it changes nothing about images of so many tokens."""
        return self.method.keeps_all(self.budget, lengths)


def _plain(value: Any, expected: Any) -> Any:
    """Numbers of NumPy, and whole numbers where a float is expected, as Python's own."""
    if isinstance(value, bool):
        return value
    if isinstance(value, numbers.Integral):
        return float(value) if expected is float else int(value)
    return float(value) if isinstance(value, numbers.Real) else value
