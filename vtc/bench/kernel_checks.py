"""Whether a kernel's result is the operation's, before it is timed.

Numbers: the error against the float32 reference is at most twice that of the official way in
bfloat16, and 2⁻⁸ of that where inputs are float32 (half of the bits by which it is finer). Copies
and indices are equal. A greedy choice is replayed in float64: at each step what the kernel chose
must be best within twice what float32 makes of the objective.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from vtc import ops

_FLOATS = ("attention_rows", "attention_received", "causal_mass", "group_merge")


@dataclass(frozen=True)
class Check:
    """Attributes:
    error: of the kernel: the largest difference, or how many choices were not the best.
    limit: what it may be.
    """

    error: float
    limit: float

    @property
    def green(self) -> bool:
        """Whether it is small enough; a NaN is not."""
        return self.error <= self.limit

    def to_dict(self) -> dict[str, float]:
        """For a row."""
        return asdict(self)


def check(op: str, args: tuple[Any, ...], got: Any, official: partial[Any]) -> Check:
    """Of a kernel's result for these arguments."""
    if op == "greedy_diverse":
        return _greedy(got, args[1], args[2], lambda g: _Likeness(args, g))
    if op == "greedy_map":
        return _greedy(got, args[1], args[2], lambda g: _Left(args[0][g]))
    want = getattr(ops, op).reference(*args)
    if op in _FLOATS:
        rounding = _error(official.func(*map(_rounded, official.args)), want)
        fine = args[0].dtype == torch.float32
        return Check(_error(got, want), rounding / 2**8 if fine else 2 * rounding)
    pairs = zip(_parts(got), _parts(want), strict=True)
    return Check(float(sum(not torch.equal(a, b) for a, b in pairs)), 0.0)


def _parts(x: Any) -> list[Tensor]:
    return list(x) if isinstance(x, tuple) else [x]


def _rounded(x: Any) -> Any:
    return x.bfloat16() if isinstance(x, Tensor) and x.is_floating_point() else x


def _error(got: Any, want: Tensor) -> float:
    # the row of a single query: one implementation keeps its dimension
    got = got.reshape(want.shape)
    return float((got.float() - want.float()).abs().max()) if got.numel() else 0.0


class _Likeness:
    """Similarity to the chosen of one group: small is good."""

    sign = 1.0

    def __init__(self, args: tuple[Any, ...], g: int) -> None:
        features, _, _, pivot, self._objective = args
        low = torch.nn.functional.normalize(features[g].float(), dim=-1)
        x = torch.nn.functional.normalize(features[g].double(), dim=-1)
        self._gram = x @ x.T
        self._rounding = float((low @ low.T - self._gram).abs().max())
        self.first: int | None = int(pivot[g])
        self._steps = 0
        self.value = torch.zeros_like(self._gram[0])

    def take(self, at: int) -> None:
        row = self._gram[at]
        nearest = self._steps and self._objective == "k_center"
        self.value = torch.maximum(self.value, row) if nearest else self.value + row
        self._steps += 1

    @property
    def slack(self) -> float:
        terms = 1 if self._objective == "k_center" else self._steps
        return 2 * terms * self._rounding


class _Left:
    """What each token of one group would add to the determinant: large is good."""

    sign = -1.0
    first: int | None = None

    def __init__(self, kernel: Tensor) -> None:
        self._kernels = kernel.double(), kernel.float()
        self._left = [k.diagonal().clone() for k in self._kernels]
        self._factors: tuple[list[Tensor], list[Tensor]] = [], []

    @property
    def value(self) -> Tensor:
        return self._left[0]

    def take(self, at: int) -> None:
        for i, (kernel, rows) in enumerate(zip(self._kernels, self._factors, strict=True)):
            row = kernel[at].clone()
            if rows:
                factor = torch.stack(rows)
                row -= factor[:, at] @ factor
            row /= self._left[i][at].clamp_min(1e-30).sqrt()
            rows.append(row)
            self._left[i] = self._left[i] - row.square()

    @property
    def slack(self) -> float:
        return 2 * float((self._left[0] - self._left[1].double()).abs().max())


def _greedy(
    got: tuple[Tensor, Tensor], valid: Tensor, counts: Tensor, start: Callable[[int], Any]
) -> Check:
    """How many of the choices were not the best that was left, give or take rounding."""
    wrong = 0
    for g, count in enumerate(counts.tolist()):
        kept = got[0][g][got[1][g]]
        if len(kept) != count or not torch.equal(kept, kept.unique()):
            wrong += max(count, 1)
            continue
        objective = start(g)
        member = torch.zeros_like(valid[g]).index_fill(0, kept, True)
        free = valid[g].clone()
        for step in range(count):
            if step == 0 and objective.first is not None:
                at, inside = objective.first, bool(member[objective.first])
            else:
                value = (objective.sign * objective.value).masked_fill(~free, float("inf"))
                mine = value.masked_fill(~member, float("inf"))
                at = int(mine.argmin())
                inside = bool(mine[at] <= value.min() + objective.slack)
            if not inside:
                wrong += 1
                break
            free[at] = False
            objective.take(at)
    return Check(float(wrong), 0.0)
