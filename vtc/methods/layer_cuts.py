"""What methods have in common that cut between decoder layers on a published schedule."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise
from typing import ClassVar, Literal

import torch
from torch import Tensor

from vtc.errors import OptionError, SignalError, VtcError
from vtc.methods.base import Exactness, Method, Site
from vtc.scorers.layer_signals import READERS, seen_tokens
from vtc.selectors import Count, Selector, TopK, mask_over
from vtc.sites import Facts, LayerCut, LayerView
from vtc.types import Budget, Signal, round_half_up, scale_layer

# decoder layers of the models that schedules were published for
PUBLISHED_DEPTH = 32


@dataclass(frozen=True, kw_only=True)
class LayerCuts(Method, abstract=True):
    """A method whose scorer and selector decide between decoder layers.

    Subclasses say behind which layers (`cuts`) and what share of an image's tokens is left behind
    each of them (`shares`).

    Args:
        budget: what `keep` counts: the tokens left behind the `"last"` cut, or their average over
            all decoder layers (`"layer_mean"`), as many papers' tables do.
    """

    site: ClassVar[Site] = "llm_layer"
    exactness: ClassVar[Exactness] = "layer_mask"
    published_positions: ClassVar[Literal["keep", "renumber", "median"]] = "keep"

    budget: Literal["last", "layer_mean"] = "last"

    @property
    def count(self) -> Count:  # type: ignore[override]  # the rest of the package only reads it
        """Exact behind the last cut; as an average, what is left there is less."""
        return "exact" if self.budget == "last" else "at_most"

    @property
    def _composed(self) -> bool:
        return True

    def default_selector(self) -> Selector:
        """The highest scores."""
        return TopK()

    def published_between(self, facts: Facts) -> Literal["keep", "renumber"]:
        """As before the LLM."""
        return "renumber" if self.published_positions == "renumber" else "keep"

    def cuts(self, facts: Facts) -> tuple[int, ...]:
        """For each stage the decoder layer behind which it cuts, ascending."""
        raise NotImplementedError(f"{type(self).__name__} must define cuts")

    def shares(self, share: float) -> tuple[float, ...]:
        """What is left behind each stage, if `share` of an image's tokens is left in the end."""
        return (share,)

    def entrance(self, share: float) -> float:
        """What reaches the LLM, if `share` of an image's tokens is left in the end."""
        return 1.0

    @property
    def needs(self) -> tuple[Signal, ...]:
        """A number made from the pixels, for scorers that draw; all else is in the view."""
        return tuple(signal for signal in super().needs if signal.name == "image_key")

    def check_facts(self, facts: Facts) -> None:
        """Layers that profit from the last cut, and a scorer that fits."""
        if facts.llm_depth < 2 or self.cuts(facts)[-1] > facts.llm_depth - 2:
            raise SignalError(
                f"method {self.name!r} drops visual tokens after decoder layer "
                f"{self.cuts(facts)[-1]}, expected an LLM with layers behind it, got "
                f"{facts.llm_depth} layers: choose a method that acts before the LLM"
            )
        asked = {signal.name for signal in self._asked}
        if unknown := sorted(asked - {*READERS, "image_key"}):
            raise SignalError(
                f"method {self.name!r} got a scorer that needs {unknown[0]!r}, expected one that "
                f"needs none but {', '.join(sorted({*READERS, 'image_key'}))}: nothing else is "
                "known between decoder layers"
            )

    def llm_layers(self, facts: Facts, budget: Budget | None = None) -> tuple[int, ...]:
        """The layers behind which it cuts."""
        if budget is not None and isinstance(budget.keep, float):
            self._final_share(budget.keep, facts)
        return tuple(sorted(set(self.cuts(facts))))

    def wanted(self, n: int, budget: Budget, facts: Facts) -> tuple[int, ...]:
        """Tokens of an image of `n` that are left behind each stage, if it had as many."""
        last = budget.count(n)
        share = self._final_share(last / n, facts)
        counts = [max(1, min(round_half_up(part * n), n)) for part in self.shares(share)]
        if self.budget == "last":
            counts = [max(last, count) for count in counts[:-1]] + [last]
        return tuple(counts)

    def entering(self, n: int, share: float, facts: Facts | None) -> int:
        """Tokens of an image of `n` that reach the LLM if `share` is what the budget says."""
        return min(round_half_up(self.entrance(self._final_share(share, facts)) * n), n)

    def _final_share(self, share: float, facts: Facts | None) -> float:
        """What is left behind the last cut if `share` is what the budget says."""
        if self.budget == "last" or share == 1:
            return share
        return self._solved(share, _known(self.name, facts))

    def _solved(self, mean: float, facts: Facts) -> float:
        """The last share with which the average over decoder layers is `mean`."""
        least = self.layer_mean(0.0, facts)
        if mean <= least:
            raise OptionError(
                f"method {self.name!r} got keep={mean:.4g} as an average over decoder layers, "
                f"expected more than {least:.4g}: as much is spent before its cuts, at layers "
                f"{self.cuts(facts)} of {facts.llm_depth}; pass budget='last' or more"
            )
        return _bisected(self, mean, facts)

    def layer_mean(self, share: float, facts: Facts) -> float:
        """The share of tokens averaged over decoder layers, if `share` is left in the end."""
        ends = [0, *(cut + 1 for cut in self.cuts(facts)), facts.llm_depth]
        spans = [after - before for before, after in pairwise(ends)]
        parts = (self.entrance(share), *self.shares(share))
        return sum(n * part for n, part in zip(spans, parts, strict=True)) / facts.llm_depth

    def layer_cut(self, view: LayerView, budget: Budget) -> Tensor | LayerCut:
        """What the scorer and the selector leave of each image, `bool[G, N]`."""
        counts = self.layer_counts(view, budget)
        if torch.equal(view.left, counts):
            return view.valid
        return self.chosen(view, counts)

    def layer_counts(self, view: LayerView, budget: Budget) -> Tensor:
        """What the schedule says of each image, or what is left of it if that is less."""
        facts = _known(self.name, view.facts)
        # stages that fall on the same layer are one: the last of them counts
        stage = max(i for i, layer in enumerate(self.cuts(facts)) if layer == view.layer)
        wanted = [self.wanted(n, budget, facts)[stage] for n in view.tokens]
        return torch.minimum(view.left, torch.tensor(wanted, dtype=torch.long))

    def capture_refusal(self) -> str | None:
        """None where rows of attention are all that is looked at and the highest stay."""
        own, kind = (LayerCuts.chosen, LayerCuts.layer_cut), type(self)
        asked = {signal.name for signal in self._asked}
        plain = (kind.chosen, kind.layer_cut) == own and type(self.active_selector) is TopK
        if plain and asked <= {"last_row", "next_last_row"}:
            return None
        return super().capture_refusal()

    @property
    def _asked(self) -> tuple[Signal, ...]:
        """What the scorer is told."""
        return super().needs

    def chosen(self, view: LayerView, counts: Tensor) -> Tensor | LayerCut:
        """Which `counts[g]` of the tokens of each group stay, `bool[G, N]`, or what others become
        of them."""
        scorer, selector = self.active_scorer, self.active_selector
        scores = None
        tokens = seen_tokens(view, self._asked)
        if scorer is not None and selector.uses_scores:
            scores = scorer(tokens)
        return mask_over(selector(tokens, scores, counts), view.valid)


def cut_before(layer: int, facts: Facts) -> int:
    """Behind which layer is cut so that a layer, published for 32, is the first without what goes;
    later where encoder features are added behind the first layers."""
    return max(scale_layer(layer, PUBLISHED_DEPTH, facts.llm_depth) - 1, facts.first_layer_cut)


def cut_behind(layer: int, facts: Facts) -> int:
    """The layer, published for 32, that is the last to see what goes."""
    return max(scale_layer(layer, PUBLISHED_DEPTH, facts.llm_depth), facts.first_layer_cut)


def rising(layers: Sequence[int], least: int) -> bool:
    """Whether these are numbers of layers, at least one of them, from `least` on and ascending."""
    return bool(layers) and layers[0] >= least and all(a < b for a, b in pairwise(layers))


def interpolated(published: Sequence[Sequence[int]], n: int, share: float) -> tuple[float, ...]:
    """Of counts published for a few budgets of `n` tokens, those of another, as shares.

    Linear in the last count, between nothing and everything.

    Args:
        published: a row of counts, one for each stage, for each budget; ascending in the last.
        n: the tokens they were published for.
        share: what is left behind the last stage.
    """
    rows = [[0.0] * len(published[0]), *([c / n for c in row] for row in published)]
    rows.append([1.0] * len(published[0]))
    for low, high in pairwise(rows):
        if share <= high[-1]:
            part = (share - low[-1]) / (high[-1] - low[-1])
            between = [a + (b - a) * part for a, b in zip(low, high, strict=True)]
            return (*between[:-1], share)
    return tuple(rows[-1])


def _known(name: str, facts: Facts | None) -> Facts:
    if facts is None:
        raise VtcError(
            f"method {name!r} was asked about decoder layers of no model, expected on(facts) first"
        )
    return facts


@lru_cache(maxsize=256)
def _bisected(method: LayerCuts, mean: float, facts: Facts) -> float:
    low, high = 0.0, 1.0
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if method.layer_mean(middle, facts) < mean else (low, middle)
    return high
