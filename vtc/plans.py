"""What a method says about decoder layers instead of tokens: a `LayerRule` for each.

No token leaves the sequence. Letters: B batch rows, S entries of the prompt, H query heads, L
decoder layers.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from vtc.errors import OptionError
from vtc.types import Selection, Tokens


def layers_as_tokens(depth: int, seed: int = 0) -> Tokens:
    """The decoder layers as one group of tokens without features, for scorers and selectors."""
    return Tokens(
        features=torch.zeros(1, depth, 0),
        valid=torch.ones(1, depth, dtype=torch.bool),
        grid=((1, 1, depth),),
        parent=torch.zeros(1, 2, dtype=torch.int64),
        signals={"image_key": torch.zeros(1, dtype=torch.int64)},
        seed=seed,
    )


@dataclass(frozen=True)
class Redistribution:
    """How attention that falls on sinks goes to the other visual tokens (VAR).

    Attributes:
        rho: a head is image-centric for a row where at most this share of its visual attention
            falls on visual sinks.
        p: what sinks keep of their attention, in [0, 1].
        least: the visual attention a head must have at least.
    """

    rho: float
    p: float
    least: float


@dataclass(frozen=True, eq=False)
class LayerRule:
    """What visual tokens do, and how they are read, in one decoder layer; by default as in stock.

    Attributes:
        attention: whether visual rows issue queries. If not, no query and no output is projected
            for them and attention leaves them as they are; their keys and values stay.
        ffn: whether visual rows go through the feed-forward network; if not, it leaves them.
        radius: visual rows see, of all visual tokens, those at most this many rows and columns away
            in their own grid; None: all before them.
        heads: `bool[H]`, the heads that read visual tokens and update visual rows; None: all.
        renormalize: whether attention to visual tokens in the other heads goes to text (as if they
            were not there) or vanishes.
        unread: `bool[B, S]`, visual tokens that text rows do not attend to; None: none.
        sinks: `bool[B, S]`, entries that count as attention sinks, text included; None: none.
        redistribution: what becomes of the attention to `sinks`; None: nothing.
    """

    attention: bool = True
    ffn: bool = True
    radius: int | None = None
    heads: Tensor | None = None
    renormalize: bool = True
    unread: Tensor | None = None
    sinks: Tensor | None = None
    redistribution: Redistribution | None = None

    @property
    def active(self) -> bool:
        """Whether visual rows do all that they do in the stock model."""
        return self.attention and self.ffn

    @property
    def rereads(self) -> bool:
        """Whether attention differs from stock among the rows that attend."""
        return not (
            self.radius is None
            and (self.heads is None or bool(self.heads.all()))
            and (self.unread is None or not bool(self.unread.any()))
            and self.redistribution is None
        )

    @property
    def lasts(self) -> bool:
        """Whether later steps need the rule too, not only the prompt's."""
        return replace(self, radius=None).rereads

    @property
    def is_stock(self) -> bool:
        """Whether the layer is left alone."""
        return self.active and not self.rereads

    def __and__(self, other: LayerRule) -> LayerRule:
        """Both rules at once.

        Raises:
            OptionError: both redistribute, or they prune heads in different ways.
        """
        if self.redistribution is not None and other.redistribution is not None:
            raise OptionError(
                "two methods redistribute the attention of the same layer, expected one: leave one "
                "out of the composition"
            )
        pruned = [r for r in (self, other) if r.heads is not None]
        if len({r.renormalize for r in pruned}) > 1:
            raise OptionError(
                "two methods prune heads of the same layer, one with renormalize=True and one with "
                "renormalize=False, expected the same"
            )
        radii = [r.radius for r in (self, other) if r.radius is not None]
        takes = self if self.redistribution is not None else other
        return LayerRule(
            attention=self.attention and other.attention,
            ffn=self.ffn and other.ffn,
            radius=min(radii, default=None),
            heads=_joined(self.heads, other.heads, torch.logical_and),
            renormalize=pruned[0].renormalize if pruned else True,
            unread=_joined(self.unread, other.unread, torch.logical_or),
            sinks=takes.sinks if takes.redistribution is not None else self.sinks,
            redistribution=takes.redistribution,
        )


def _joined(a: Tensor | None, b: Tensor | None, how: object) -> Tensor | None:
    if a is None or b is None:
        return b if a is None else a
    return how(a, b.to(a.device))  # type: ignore[operator,no-any-return]


@dataclass(frozen=True, eq=False)
class LayerPlan:
    """A decision over decoder layers as data.

    Attributes:
        rules: one for each decoder layer.
        scores: `float32[L]`, higher = keep active, or None where nothing was scored.
    """

    rules: tuple[LayerRule, ...]
    scores: Tensor | None = None

    @classmethod
    def stock(cls, depth: int) -> LayerPlan:
        """The plan that leaves every layer alone."""
        return cls((LayerRule(),) * depth)

    @classmethod
    def skipping(
        cls, layers: Iterable[int], depth: int, rule: LayerRule, scores: Tensor | None = None
    ) -> LayerPlan:
        """The plan that has `rule` in force in these layers."""
        chosen = set(layers)
        return cls(tuple(rule if i in chosen else LayerRule() for i in range(depth)), scores)

    @classmethod
    def of_active(cls, selection: Selection, rule: LayerRule) -> LayerPlan:
        """The plan that leaves the selected layers alone; `rule` is in force in the others.

        Args:
            selection: over one group of L tokens, the decoder layers.
        """
        active = selection.mask()[0]
        depth = selection.lengths[0]
        scores = None if selection.scores is None else selection.scores[0, :depth]
        return cls.skipping((~active[:depth]).nonzero()[:, 0].tolist(), depth, rule, scores)

    @property
    def active(self) -> tuple[bool, ...]:
        """Per layer, whether visual rows do all that they do in the stock model."""
        return tuple(rule.active for rule in self.rules)

    @property
    def is_stock(self) -> bool:
        """Whether every layer is left alone."""
        return all(rule.is_stock for rule in self.rules)

    def __and__(self, other: LayerPlan) -> LayerPlan:
        """Both plans at once."""
        rules = tuple(a & b for a, b in zip(self.rules, other.rules, strict=True))
        return LayerPlan(rules, self.scores if other.scores is None else other.scores)
