"""What a method is: one paper, one frozen dataclass, composed of a scorer and a selector."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any, ClassVar, Literal, get_type_hints

from huggingface_hub.dataclasses import type_validator

from vtc.errors import OptionError
from vtc.scorers import SCORERS, Scorer
from vtc.selectors import SELECTORS, Selector
from vtc.types import Budget, Selection, Signal, Tokens

Site = Literal["pixels", "llm_input"]
Count = Literal["exact", "at_most", "adaptive"]
Exactness = Literal["mask", "layer_mask", "restatement"]
Positions = Literal["keep", "renumber", "median", "published"]


@dataclass(frozen=True, kw_only=True)
class Method:
    """Base of all methods. Fields are options: typed, validated, printable.

    Args:
        scorer: replaces the method's own scorer: an object, or a name such as `"random"`.
        selector: replaces the method's own selector: an object, or a name such as `"top_k"`.

    Attributes:
        name: what users write in `vtc.patch(model, method=name)`.
        summary: one line for `vtc.methods()`.
        site: where the choice acts: `"pixels"` (before the encoder) or `"llm_input"` (before the
            LLM).
        count: whether `keep` is met exactly, is an upper bound, or is the method's own affair.
        exactness: what the patched model equals, see the contract: `"mask"` or `"restatement"`.
        published_positions: what `positions="published"` means for it.
    """

    name: ClassVar[str]
    summary: ClassVar[str]
    site: ClassVar[Site] = "llm_input"
    count: ClassVar[Count] = "exact"
    exactness: ClassVar[Exactness] = "mask"
    published_positions: ClassVar[Literal["keep", "renumber", "median"]] = "renumber"

    scorer: Scorer | str | None = None
    selector: Selector | str | None = None

    def __post_init__(self) -> None:
        hints = get_type_hints(type(self))
        for option in fields(self):
            value = getattr(self, option.name)
            if hints[option.name] is float and type(value) is int:
                object.__setattr__(self, option.name, value := float(value))
            try:
                type_validator(option.name, value, hints[option.name])
            except TypeError as error:
                raise OptionError(f"method {self.name!r}: {error}") from None
        object.__setattr__(self, "scorer", self._swap(self.scorer, SCORERS, "scorer"))
        object.__setattr__(self, "selector", self._swap(self.selector, SELECTORS, "selector"))

    def _swap(self, given: Any, table: dict[str, Any], what: str) -> Any:
        if not isinstance(given, str):
            return given
        if given not in table:
            raise OptionError(
                f"method {self.name!r}: {what} {given!r} is unknown; expected one of "
                f"{sorted(table)}"
            )
        return table[given]()

    def default_scorer(self) -> Scorer | None:
        """The scorer as published; None for methods that need none."""
        return None

    def default_selector(self) -> Selector:
        """The selector as published."""
        raise NotImplementedError(f"{type(self).__name__} must define default_selector or select")

    @property
    def active_scorer(self) -> Scorer | None:
        """The scorer in use: the one given, else the published one."""
        return self.scorer if isinstance(self.scorer, Scorer) else self.default_scorer()

    @property
    def active_selector(self) -> Selector:
        """The selector in use: the one given, else the published one."""
        return self.selector if isinstance(self.selector, Selector) else self.default_selector()

    @property
    def needs(self) -> tuple[Signal, ...]:
        """What the runtime must capture for `select`."""
        scorer = self.active_scorer
        return scorer.needs if scorer else ()

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
        return Budget.of(keep)

    def select(self, tokens: Tokens, budget: Budget) -> Selection:
        """Decide which tokens of each group reach the LLM."""
        selector, scorer = self.active_selector, self.active_scorer
        scores = scorer(tokens) if scorer and selector.uses_scores else None
        return selector(tokens, scores, budget.counts(tokens.valid, tokens.parent))
