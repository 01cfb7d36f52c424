"""What a scorer is: Tokens -> scores, higher = keep."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import ClassVar

from torch import Tensor

from vtc.sites import Facts
from vtc.types import Signal, Tokens


class Scorer(ABC):
    """Gives every token of every group a score. Subclasses are frozen dataclasses.

    `name` is what users write to swap a method's scorer; `needs` is what the runtime must capture;
    `needs_grid` says whether it looks at how tokens lie in a grid, so that none may be gone before.
    """

    name: ClassVar[str]
    needs_grid: ClassVar[bool] = False

    @property
    def needs(self) -> tuple[Signal, ...]:
        """Signals read by `__call__`."""
        return ()

    def on(self, facts: Facts) -> Scorer:
        """The scorer as it scores on such a model: itself, unless it must know the model."""
        return self

    def around(self, own: Scorer | None) -> Scorer:
        """The scorer in the place of a method's own: itself, unless it stands in front of that."""
        return self

    @abstractmethod
    def __call__(self, tokens: Tokens) -> Tensor:
        """Scores `float32[G, N]`; what invalid tokens get does not matter."""
