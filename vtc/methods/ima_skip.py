"""IMA skips: visual rows skip FFN, attention or both in every so many decoder layers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from vtc.errors import OptionError
from vtc.methods.base import Exactness, Method, Site
from vtc.methods.layer_choice import chosen_layers
from vtc.plans import LayerPlan, LayerRule
from vtc.selectors import Count, Selector, UniformStride
from vtc.sites import Facts
from vtc.types import Budget, Tokens


@dataclass(frozen=True, kw_only=True)
class ImaSkip(Method):
    """Skipping computations (Shukor and Cord, arXiv 2410.09454, with 2405.16700; official code
    mshukor/ima-lmms), on visual rows alone.

    Layer l is affected iff start < l < end and l mod I = 0. There, in the prefill, visual rows skip
    the feed-forward network, attention (they issue no query; keys and values stay), or the block:
    they are frozen.

    The official code is for models with ten visual tokens at the start of the prompt. Its "context"
    modes skip for text too; its visual-only mode adds LN(x) to the rows that skip; skipped
    attention caches LN(x) in the place of keys and a skipped block the layer before's. None of that
    is done here: rows that skip are left as they are and keys and values are their own.

    With `interval=None`, `keep` is the share of decoder layers in which visual rows stay active;
    they are evenly spaced unless a selector says otherwise.

    Args:
        operator: what is skipped.
        interval: I, 2 in the official README; several: one for each of as many equal stretches of
            layers. None: `keep` and the selector decide.
        start: the layer before the first that may be affected.
        end: the layer behind the last that may be; None: the last layer of the model (31 of 32 in
            the official code).
    """

    name: ClassVar[str] = "ima_skip"
    summary: ClassVar[str] = "visual rows skip FFN, attention or both in every so many layers"
    site: ClassVar[Site] = "llm_rows"
    exactness: ClassVar[Exactness] = "restatement"
    published_positions: ClassVar[Literal["keep"]] = "keep"
    bibtex: ClassVar[str] = """@article{shukor2024skipping,
  title={Skipping Computations in Multimodal LLMs},
  author={Shukor, Mustafa and Cord, Matthieu},
  journal={arXiv preprint arXiv:2410.09454},
  year={2024}
}"""

    operator: Literal["ffn", "attention", "block"] = "ffn"
    interval: int | tuple[int, ...] | None = 2
    start: int = 0
    end: int | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        wanted = "whole numbers of at least 1, or None to choose by keep"
        self.expect(all(i >= 1 for i in self._intervals), wanted, "interval")

    @property
    def _intervals(self) -> tuple[int, ...]:
        given = self.interval
        return () if given is None else given if isinstance(given, tuple) else (given,)

    @property
    def count(self) -> Count:  # type: ignore[override]  # the rest of the package only reads it
        """The schedule's own, unless `keep` decides."""
        return "exact" if self.interval is None else "adaptive"

    @property
    def _composed(self) -> bool:
        return self.interval is None

    def default_selector(self) -> Selector:
        """Evenly spaced layers stay active."""
        return UniformStride()

    def plan(self, layers: Tokens, facts: Facts, budget: Budget) -> LayerPlan:
        """Skip by the schedule, or in the layers that are not selected."""
        rule = LayerRule(attention=self.operator == "ffn", ffn=self.operator == "attention")
        if self.interval is None:
            return LayerPlan.of_active(chosen_layers(self, layers, budget, {}), rule)
        return LayerPlan.skipping(self.affected(facts.llm_depth), facts.llm_depth, rule)

    def affected(self, depth: int) -> tuple[int, ...]:
        """The layers of the schedule.

        Raises:
            OptionError: there is none.
        """
        end = depth - 1 if self.end is None else self.end
        # equal stretches of layers, the last one longer where they do not divide
        stretch = max(depth // len(self._intervals), 1)
        found = tuple(
            layer
            for layer in range(depth)
            if self.start < layer < end
            and layer % self._intervals[min(layer // stretch, len(self._intervals) - 1)] == 0
        )
        if not found:
            raise OptionError(
                f"method {self.name!r} with interval={self.interval!r} affects no layer between "
                f"{self.start} and {end} of {depth}, expected at least one: pass a smaller interval"
            )
        return found
