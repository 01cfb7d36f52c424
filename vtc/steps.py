"""Decisions before the LLM one after the other: each chooses among what the one before left.

What a step sees is short; what it says is told in the original tokens of each image again.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from vtc import ops
from vtc.errors import OptionError, UnsupportedModeError, VtcError
from vtc.methods.base import Method, Step
from vtc.types import VECTORS, Budget, Selection, Tokens


@dataclass(frozen=True)
class Remaining(Budget):
    """A budget relative to what each image had before earlier steps.

    Args:
        keep: as in `Budget`.
        lengths: tokens of each image in the stock model.
    """

    lengths: tuple[int, ...] = ()

    def of_image(self, image: int, n: int) -> int:
        """Tokens kept of an image that has `n` left: as of all it had, at most `n`."""
        return min(super().count(self.lengths[image]), n)

    def count(self, n: int) -> int:
        """Refused where `keep` is a fraction: the image has to be known."""
        if isinstance(self.keep, float):
            raise OptionError(
                f"the count of {n} tokens was asked for behind another stage, expected "
                "budget.counts(tokens.valid, tokens.parent): a fraction is one of all tokens that "
                "the image had"
            )
        return super().count(n)


def decisions(
    steps: Iterable[Step],
    tokens_of: Callable[[Method, Selection | None], Tokens],
    first: Selection | None = None,
) -> list[Selection]:
    """What each step leaves, in original tokens.

    Args:
        steps: of site `"pixels"` or `"llm_input"`.
        tokens_of: all tokens of each image, with the signals that a method needs where this is what
            is left of them (None: everything).
        first: what was left before the first step; None: everything.

    Raises:
        UnsupportedModeError: a step would choose among merged tokens.
        VtcError: a step decides over other groups than it was given.
    """
    found: list[Selection] = []
    left = first
    for step in steps:
        if left is not None and left.merge is not None:
            raise UnsupportedModeError(
                f"method {step.method.name!r} was to choose among tokens that a stage before it "
                "merged, expected tokens of the encoder: put the stage that merges last"
            )
        before = None if left is None or left.is_identity else left
        tokens, budget = tokens_of(step.method, before), step.budget
        if before is not None:
            budget = Remaining(budget.keep, tokens.lengths)
            vectors = {need.key for need in step.method.needs if need.name in VECTORS}
            tokens = narrowed(tokens, before, vectors)
        selection = step.method.select(tokens, budget)
        if not isinstance(selection, Selection) or selection.lengths != tokens.lengths:
            got = getattr(selection, "lengths", type(selection).__name__)
            raise VtcError(
                f"method {step.method.name!r} decided over {got}, expected a Selection over "
                f"{tokens.lengths} tokens: return one for the groups given to select"
            )
        left = selection if before is None else widened(selection, before)
        found.append(left)
    return found


def narrowed(tokens: Tokens, left: Selection, vectors: Collection[str] = ()) -> Tokens:
    """The tokens that a selection left, moved together.

    A group that lost some is a row of tokens without a grid. Where nothing of the part that shows
    the whole picture is left, all does.

    Args:
        tokens: all of them.
        left: over these.
        vectors: the signals that are `[G, N, D]`; others may be `[G, ..., N]`.
    """
    keep, valid = (x.to(tokens.valid.device) for x in (left.keep, left.valid))
    counts, everything = left.valid.sum(-1).tolist(), tokens.lengths
    cut = [n < before for n, before in zip(counts, everything, strict=True)]
    rows = tuple((1, 1, n) for n in counts)
    grid = tuple(r if c else g for r, c, g in zip(rows, cut, tokens.grid, strict=True))
    parts = tokens.parts
    if parts is not None:
        parts = tuple((r,) if c else p for r, c, p in zip(rows, cut, parts, strict=True))
    signals = dict(tokens.signals)
    for name, x in signals.items():
        if name in vectors:
            signals[name] = ops.compact(x, keep.to(x.device), valid.to(x.device))
        elif x.dim() > 1 and x.shape[-1] == tokens.valid.shape[1]:
            signals[name] = _gathered(x, keep, valid)
    return replace(
        tokens,
        features=ops.compact(tokens.features, keep, valid),
        valid=valid,
        grid=grid,
        parts=parts,
        signals=signals,
        overview=None if tokens.overview is None else _ranges(tokens.overview, left),
        counted=tuple(counts),
        index=keep if tokens.index is None else tokens.index.gather(1, keep),
    )


def _gathered(x: Tensor, keep: Tensor, valid: Tensor) -> Tensor:
    """Numbers of tokens `[G, ..., N]` as those of the ones that are left, 0 on padding."""
    shape = (len(keep), *[1] * (x.dim() - 2), keep.shape[1])
    index, there = (part.to(x.device).view(shape) for part in (keep, valid))
    return x.gather(-1, index.expand(*x.shape[:-1], -1)).masked_fill(~there, 0)


def _ranges(ranges: tuple[tuple[int, int], ...], left: Selection) -> tuple[tuple[int, int], ...]:
    """Token ranges of each group among the tokens that are left."""
    found = []
    for span, keep, valid in zip(ranges, left.keep.cpu(), left.valid.cpu(), strict=True):
        first, end = (int((keep[valid] < at).sum()) for at in span)
        found.append((first, end) if first < end else (0, int(valid.sum())))
    return tuple(found)


def widened(selection: Selection, left: Selection) -> Selection:
    """A decision among what another one left, told in the tokens that were there before it.

    Scores of tokens that were gone already are −∞.
    """
    device = selection.keep.device
    index = left.keep.to(device)

    def original(token: Tensor) -> Tensor:
        return torch.where(token < 0, token, index.gather(1, token.clamp_min(0)))

    positions = selection.positions
    merge, scores = selection.merge, selection.scores
    if merge is not None:
        merge = (merge[0], original(merge[1]).masked_fill(merge[2] == 0, 0), merge[2])
    if scores is not None:
        width = max(left.lengths, default=0)
        wide = scores.new_full((len(scores), width + 1), float("-inf"))
        valid = left.valid.to(scores.device)
        places = index.to(scores.device).masked_fill(~valid, width)
        scores = wide.scatter(1, places, scores)[:, :-1]
    return Selection(
        keep=original(selection.keep).masked_fill(~selection.valid, 0),
        valid=selection.valid,
        lengths=left.lengths,
        parent=left.parent,
        grid=left.grid,
        scores=scores,
        positions=None if positions is None else original(positions),
        merge=merge,
        parts=left.parts,
        merged=selection.merged,
        sends_cls=selection.sends_cls,
    )
