"""Greedy maximum coverage: again and again the token that covers most of what is left uncovered."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn.functional import normalize

from vtc.checks import require_none
from vtc.errors import OptionError
from vtc.selectors.base import Selector, ascending, checked_scores, selection_of
from vtc.types import Selection, Signal, Tokens


def greedy_coverage(
    likeness: Tensor, valid: Tensor, counts: Tensor, weight: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Tokens by gain_i = w_i · Σ_j max(0, L_ji − m_j), where m_j is the highest L_jc of the chosen
    c, at first 0; ties go to the lowest index. O(K·R·N) in float32.

    Without weights this is the greedy maximization of Σ_j max_c L_jc (facility location).

    Args:
        likeness: `[G, R, N]`, how well each token covers each of R rows; rows of zeros are padding.
        valid: `bool[G, N]`; an invalid token is never chosen.
        counts: `int64[G]` on the CPU, at most the valid tokens of the group.
        weight: `[G, N]`, w ≥ 0; None: 1.

    Returns:
        `keep`, `int64[G, K]` with K = max(counts), ascending, 0 where not valid, and `bool[G, K]`.
    """
    width = int(counts.max()) if len(counts) else 0
    likeness = likeness.float().masked_fill(~valid[:, None], 0)
    covered, taken, chosen = likeness.new_zeros(likeness.shape[:2]), ~valid, []
    for _ in range(width):
        gain = (likeness - covered[..., None]).clamp_min(0).sum(1)
        if weight is not None:
            gain = gain * weight
        pick = gain.masked_fill(taken, float("-inf")).argmax(-1, keepdim=True)
        column = likeness.gather(2, pick[:, None].expand(-1, likeness.shape[1], -1))[..., 0]
        covered, taken = torch.maximum(covered, column), taken.scatter(1, pick, True)
        chosen.append(pick)
    index = torch.cat(chosen, 1) if chosen else valid.new_zeros(len(valid), 0).long()
    return ascending(index, counts, valid.shape[1])


def cosines(x: Tensor, valid: Tensor) -> Tensor:
    """Cosine similarities `float32[G, N, N]` of `[G, N, D]`, 0 on padding."""
    x = normalize(x.float().masked_fill(~valid[..., None], 0), dim=-1)
    return x @ x.mT


@dataclass(frozen=True)
class Comparing(Selector):
    """A selector that compares tokens.

    Args:
        of: the signal whose vectors are compared; None: tokens in the LLM's embedding space.
    """

    of: Signal | None = None

    @property
    def needs(self) -> tuple[Signal, ...]:
        """The vectors compared."""
        return () if self.of is None else (self.of,)

    def vectors(self, tokens: Tokens) -> Tensor:
        """`[G, N, D]`; raises `VtcError` where one of a valid token is NaN."""
        x = tokens.features if self.of is None else tokens.signal(self.of.key)
        require_none(
            x.isnan().any(-1) & tokens.valid,
            f"{self.name} got NaN features, expected numbers: load the model in float32 or "
            "bfloat16",
        )
        return x


@dataclass(frozen=True)
class Coverage(Comparing):
    """Tokens that cover the others by cosine, each gain times its score to the power of `alpha`.

    Args:
        alpha: 0: scores do not matter.
    """

    name: ClassVar[str] = "coverage"
    alpha: float = 1.0

    def __post_init__(self) -> None:
        if self.alpha < 0:
            raise OptionError(f"coverage got alpha={self.alpha}, expected at least 0")

    def __call__(self, tokens: Tokens, scores: Tensor | None, counts: Tensor) -> Selection:
        """Choose; raises `VtcError` on missing or NaN scores or features."""
        scores = checked_scores(self.name, tokens, scores)
        x = self.vectors(tokens)
        weight = scores.masked_fill(~tokens.valid, 0).clamp_min(0) ** self.alpha
        keep, valid = greedy_coverage(cosines(x, tokens.valid), tokens.valid, counts, weight)
        return selection_of(tokens, keep, valid, scores)
