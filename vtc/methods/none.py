"""The full model: nothing is dropped."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from vtc.errors import OptionError
from vtc.methods.base import Method
from vtc.types import Budget, Selection, Tokens


@dataclass(frozen=True, kw_only=True)
class NoCompression(Method):
    """Baseline: the stock model, with the accounting of a patched one."""

    name: ClassVar[str] = "none"
    summary: ClassVar[str] = "baseline: every token is kept"
    published_positions: ClassVar = "keep"

    def check_keep(self, keep: float | int | None) -> Budget:
        """Only None or 1.0."""
        if keep is not None and not (isinstance(keep, float) and keep == 1.0):
            raise OptionError(
                f"method 'none' keeps everything and got keep={keep!r}; pass 1.0 or leave it out"
            )
        return Budget(1.0)

    def select(self, tokens: Tokens, budget: Budget) -> Selection:
        """Everything."""
        return Selection.everything(tokens.lengths, tokens.parent, tokens.grid)
