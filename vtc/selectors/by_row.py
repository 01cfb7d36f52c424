"""Another selector in every crop, tile or frame of an image by itself."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from vtc.dispatch import constant
from vtc.selectors.base import Count, Selector
from vtc.selectors.top_k import TopK
from vtc.sites import Facts
from vtc.types import ENCODER_ROW, VECTORS, Selection, Signal, Tokens, largest_remainder

Grid = tuple[int, int, int]


@dataclass(frozen=True, eq=False)
class Rows:
    """How groups of tokens fall into rows of the encoder.

    Attributes:
        group: `int64[R]`, the group of each row.
        index: `int64[R, M]`, which tokens of its group a row holds, ascending; 0 on padding.
        valid: `bool[R, M]`.
        grids: of each row.
        sizes: tokens of each row.
    """

    group: Tensor
    index: Tensor
    valid: Tensor
    grids: tuple[Grid, ...]
    sizes: tuple[int, ...]

    def shares(self, counts: Tensor) -> Tensor:
        """`int64[R]`: the counts of groups shared by their rows, by largest remainder."""
        out: list[int] = []
        for g, count in enumerate(counts.tolist()):
            sizes = [n for n, of in zip(self.sizes, self.group.tolist(), strict=True) if of == g]
            out += largest_remainder(sizes, lambda n, count=count: min(count, n))  # type: ignore[misc]
        return torch.tensor(out, dtype=torch.int64)

    def gather(self, x: Tensor, *, vectors: bool) -> Tensor:
        """Of each group `[G, ..., N]`, or vectors `[G, N, D]`, as of each row; 0 on padding."""
        group, index, valid = (constant(v, x.device) for v in (self.group, self.index, self.valid))
        if vectors:
            return x[group[:, None], index].masked_fill(~valid[..., None], 0)
        shape = (len(index), *[1] * (x.dim() - 2), index.shape[1])
        at = index.view(shape).expand(len(index), *x.shape[1:-1], -1)
        return x[group].gather(-1, at).masked_fill(~valid.view(shape), 0)


def rows_of(tokens: Tokens) -> Rows | None:
    """The rows of all groups; None where each is one."""
    found = tokens.signal(ENCODER_ROW).cpu()
    if not len(found) or int(found.max()) == 0:
        return None
    group, index, grids = [], [], []
    for g, n in enumerate(tokens.lengths):
        parts = (tokens.grid[g],) if tokens.parts is None else tokens.parts[g]
        places = _places(parts) if sum(t * h * w for t, h, w in parts) == n else None
        for row in found[g, :n].unique().tolist():
            at = (found[g, :n] == row).nonzero()[:, 0]
            group.append(g)
            index.append(at)
            grids.append((1, 1, len(at)) if places is None else _grid(places[at]))
    sizes = tuple(map(len, index))
    valid = torch.arange(max(sizes)) < torch.tensor(sizes)[:, None]
    return Rows(
        torch.tensor(group), pad_sequence(index, batch_first=True), valid, tuple(grids), sizes
    )


def _places(parts: Sequence[Grid]) -> Tensor:
    """Part, row and column of each token, `int64[N, 3]`; frames are parts."""
    found, first = [], 0
    for t, h, w in parts:
        frames = torch.arange(first, first + t)
        found.append(torch.cartesian_prod(frames, torch.arange(h), torch.arange(w)).view(-1, 3))
        first += t
    return torch.cat(found)


def _grid(places: Tensor) -> Grid:
    """Of tokens that fill a rectangle; otherwise they are a row without a grid."""
    t, h, w = (len(axis.unique()) for axis in places.T)
    return (t, h, w) if t * h * w == len(places) else (1, 1, len(places))


def split(tokens: Tokens, rows: Rows, needs: tuple[Signal, ...]) -> Tokens:
    """The rows as groups, with these signals."""
    given = {need.key: need.name in VECTORS for need in needs if need.key in tokens.signals}
    signals = {}
    for key, vectors in given.items():
        x = tokens.signals[key]
        of = constant(rows.group, x.device)
        signals[key] = rows.gather(x, vectors=vectors) if x.dim() > 1 else x[of]
    return Tokens(
        features=rows.gather(tokens.features, vectors=True),
        valid=constant(rows.valid, tokens.valid.device),
        grid=rows.grids,
        parent=tokens.parent[rows.group.to(tokens.parent.device)],
        text=tokens.text,
        text_valid=tokens.text_valid,
        signals=signals,
        seed=tokens.seed,
        counted=rows.sizes,
    )


def joined(
    selection: Selection, rows: Rows, tokens: Tokens, scores: Tensor | None, most: int
) -> Selection:
    """A decision over rows as one over their groups: kept tokens, `most` of a group, in order, then
    appended ones."""
    device, n = selection.keep.device, tokens.valid.shape[1]
    index, kept = constant(rows.index, device), selection.keep.shape[1]
    # the rows of each group side by side, `[G, W]`, −1 where it has fewer
    members = [(rows.group == g).nonzero()[:, 0] for g in range(len(tokens.lengths))]
    beside = pad_sequence(members, batch_first=True, padding_value=-1)
    there, beside = constant(beside >= 0, device), constant(beside.clamp_min(0), device)

    def laid(x: Tensor, fill: int) -> Tensor:
        return x[beside].masked_fill(~there[..., None], fill).flatten(1)  # [G, W·K]

    original = index.gather(1, selection.keep).masked_fill(~selection.valid, n)
    order = laid(original, n).argsort(dim=1, stable=True)[:, :most]
    keep = laid(original, n).gather(1, order)
    positions = index.gather(1, selection.slot_positions.clamp_min(0))
    positions = positions.masked_fill(selection.slot_positions < 0, -1)
    first, behind = laid(positions[:, :kept], -1).gather(1, order), laid(positions[:, kept:], -1)
    merge = selection.merge
    if merge is not None:
        slot, token, weight = merge
        # where a slot of a row stands among those of its group
        width, more = order.shape[1], positions.shape[1] - kept
        place = torch.zeros_like(laid(original, n)).scatter(
            1, order, torch.arange(width, device=device).expand_as(order)
        )
        number = torch.arange(beside.shape[1], device=device)[:, None]
        slots = slot[beside]  # [G, W, P]
        shifted = (number * kept + slots.clamp_max(max(kept - 1, 0))).flatten(1)
        moved = place.gather(1, shifted) if kept else shifted
        behind_slot = (width + number * more + (slots - kept)).flatten(1)
        weights = weight[beside].masked_fill(~there[..., None], 0).flatten(1)
        slots = torch.where(slots.flatten(1) < kept, moved, behind_slot)
        tokens_of = index.gather(1, token)[beside].flatten(1)
        merge = (
            slots.masked_fill(weights == 0, 0),
            tokens_of.masked_fill(weights == 0, 0),
            weights,
        )
    return Selection(
        keep=keep.masked_fill(keep == n, 0),
        valid=keep < n,
        lengths=tokens.lengths,
        parent=tokens.parent.cpu(),
        grid=tokens.grid,
        scores=scores,
        positions=torch.cat([first, behind], 1),
        merge=merge,
        parts=tokens.parts,
        merged=selection.merged,
        sends_cls=False,
    )


@dataclass(frozen=True)
class ByRow(Selector):
    """Every crop, tile or frame of an image decides by itself; they share what is kept of the image
    by largest remainder.

    Args:
        of: what decides in each.
    """

    name: ClassVar[str] = "by_row"
    of: Selector = field(default_factory=TopK)

    @property
    def uses_scores(self) -> bool:  # type: ignore[override]  # the rest only reads it
        """As what decides."""
        return self.of.uses_scores

    @property
    def count(self) -> Count:  # type: ignore[override]
        """As what decides."""
        return self.of.count

    @property
    def needs_grid(self) -> bool:  # type: ignore[override]
        """As what decides."""
        return self.of.needs_grid

    @property
    def needs(self) -> tuple[Signal, ...]:
        """The crop, tile or frame of each token, and what the other selector reads."""
        return (Signal(ENCODER_ROW), *self.of.needs)

    def on(self, facts: Facts) -> ByRow:
        """With what decides as it does on such a model."""
        known = self.of.on(facts)
        return self if known is self.of else replace(self, of=known)

    def __call__(self, tokens: Tokens, scores: Tensor | None, counts: Tensor) -> Selection:
        """Choose."""
        rows = rows_of(tokens)
        if rows is None:
            return self.of(tokens, scores, counts)
        parts = split(tokens, rows, self.of.needs)
        own = None if scores is None else rows.gather(scores, vectors=False)
        selection = self.of(parts, own, rows.shares(counts))
        most = int(counts.max()) if len(counts) else 0
        return joined(selection, rows, tokens, scores, most)
