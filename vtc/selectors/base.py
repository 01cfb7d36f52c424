"""What a selector is: Tokens, scores and a count per group -> Selection."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import ClassVar, Literal

import torch
from torch import Tensor

from vtc.checks import require_none
from vtc.dispatch import constant
from vtc.errors import VtcError
from vtc.sites import Facts
from vtc.types import Selection, Signal, Tokens

Count = Literal["exact", "at_most", "adaptive"]


class Selector(ABC):
    """Turns scores and counts into a choice. Subclasses are frozen dataclasses.

    Attributes:
        name: what users write to swap a method's selector.
        uses_scores: whether it looks at scores; if not, none are computed.
        count: whether the counts are met exactly, are an upper bound, or are its own affair.
        needs_grid: whether it looks at how tokens lie in a grid: then none may be gone before it.
    """

    name: ClassVar[str]
    uses_scores: ClassVar[bool] = True
    count: ClassVar[Count] = "exact"
    needs_grid: ClassVar[bool] = False

    @property
    def needs(self) -> tuple[Signal, ...]:
        """Signals read by `__call__`, scores aside."""
        return ()

    def on(self, facts: Facts) -> Selector:
        """The selector as it chooses on such a model: itself, unless it must know the model."""
        return self

    @abstractmethod
    def __call__(self, tokens: Tokens, scores: Tensor | None, counts: Tensor) -> Selection:
        """Choose.

        Args:
            tokens: what may be looked at.
            scores: `float32[G, N]`, or None for selectors that use none.
            counts: `int64[G]` on the CPU, tokens wanted of each group.
        """


def checked_scores(name: str, tokens: Tokens, scores: Tensor | None) -> Tensor:
    """The scores of selector `name`; raises `VtcError` where they are missing or NaN."""
    if scores is None or scores.shape != tokens.valid.shape:
        got = None if scores is None else tuple(scores.shape)
        raise VtcError(
            f"{name} got scores of shape {got}, expected {tuple(tokens.valid.shape)}: "
            f"return one score per token from the scorer"
        )
    check_numbers(name, scores, tokens.valid)
    return scores


def check_numbers(name: str, scores: Tensor, valid: Tensor) -> None:
    """Raise `VtcError`, once nothing waits for the answer, where scores of selector `name` are
    NaN."""
    require_none(
        scores.isnan() & valid,
        f"{name} got NaN scores, expected numbers: a scorer divides by zero or the "
        "model produced NaN features",
    )


def selection_of(
    tokens: Tokens, keep: Tensor, valid: Tensor, scores: Tensor | None = None
) -> Selection:
    """A selection of kept tokens only; indices `[G, K]` must be ascending."""
    return Selection(
        keep=keep,
        valid=valid,
        lengths=tokens.lengths,
        parent=tokens.parent.cpu(),
        grid=tokens.grid,
        scores=scores,
        parts=tokens.parts,
    )


def ascending(chosen: Tensor, counts: Tensor, n: int) -> tuple[Tensor, Tensor]:
    """The first `counts[g]` of `chosen int64[G, K]` of n tokens in ascending order, 0 where not
    valid, and `bool[G, K]`; `counts` are on the CPU."""
    counts = constant(counts, chosen.device)
    valid = torch.arange(chosen.shape[1], device=chosen.device) < counts[:, None]
    return chosen.masked_fill(~valid, n).sort(-1).values.masked_fill(~valid, 0), valid


def mask_over(selection: Selection, valid: Tensor) -> Tensor:
    """The kept tokens as `bool[G, N]` over tokens that padding `valid [G, N]` may stand between."""
    # one column more takes what is not kept
    mask = torch.zeros(len(valid), valid.shape[1] + 1, dtype=torch.bool, device=valid.device)
    there = selection.valid & (selection.keep >= 0)
    return mask.scatter(1, selection.keep.masked_fill(~there, valid.shape[1]), True)[:, :-1]
