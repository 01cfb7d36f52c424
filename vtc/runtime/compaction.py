"""From decisions to a shorter sequence: which entries, in which order, at which positions."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from vtc import ops
from vtc.runtime.images import Images
from vtc.types import Selection

Policy = Literal["keep", "renumber", "median"]


@dataclass(frozen=True, eq=False)
class Compaction:
    """How rows of S columns (and A appended slots each) become rows of L entries, padded on the
    left.

    Attributes:
        index: `int64[B, L]` into the S original columns followed by the A appended slots.
        valid: `bool[B, L]`, False on the padding made by compacting.
        columns: `int64[B, L]`: the original column an entry stands for (an appended slot: its
            image's last).
        origin: `int64[B, L]`: the original column whose position id an entry takes.
        length: S.
        appended: A.
    """

    index: Tensor
    valid: Tensor
    columns: Tensor
    origin: Tensor
    length: int
    appended: int

    def gather(self, x: Tensor, appended: Tensor | None = None) -> Tensor:
        """`[B, S, ...]` and appended slots `[B, A, ...]` -> `[B, L, ...]`, zeros on padding."""
        source = x if appended is None else torch.cat([x, appended.to(x)], 1)
        return ops.compact(source, self.index, self.valid)

    def mask(self, attention_mask: Tensor) -> Tensor:
        """`[B, S]` -> `[B, L]`; appended slots are attended to."""
        return self.gather(
            attention_mask, attention_mask.new_ones(len(attention_mask), self.appended)
        )

    def positions(self, position_ids: Tensor, mask: Tensor, policy: Policy) -> Tensor:
        """Position ids `[(P,) B, S]` -> `[(P,) B, L]`; `mask` is the compacted one."""
        rows = torch.arange(len(self.origin), device=self.origin.device)[:, None]
        kept = position_ids.expand(*position_ids.shape[:-2], *self.columns.shape[:1], -1)[
            ..., rows, self.origin
        ]
        if policy == "renumber":
            first = kept.masked_fill(mask == 0, torch.iinfo(kept.dtype).max).amin(-1, keepdim=True)
            kept = first + mask.long().cumsum(-1) - 1
        return kept.masked_fill(mask == 0, 0)

    def restore(self, hidden: Tensor) -> Tensor:
        """`[B, L, D]` -> `[B, S, D]`: every column takes the last entry at or before it.

        So what follows an image is predicted from its last surviving token, as in the short
        sequence.
        """
        entry = torch.arange(self.index.shape[1], device=hidden.device).expand_as(self.index)
        first = self.valid.int().argmax(-1, keepdim=True)
        last = hidden.new_full((len(hidden), self.length), -1, dtype=torch.long)
        where = self.columns.masked_fill(~self.valid, 0)
        last.scatter_reduce_(1, where, entry.masked_fill(~self.valid, -1), "amax")
        last = torch.maximum(last.cummax(-1).values, first)
        return ops.compact(hidden, last, torch.ones_like(last, dtype=torch.bool))


def plan(
    images: Images, selection: Selection, attention_mask: Tensor, policy: Policy
) -> Compaction:
    """Lay out the short sequence: text and kept tokens in order, appended slots behind their image.

    Columns that are padding at the left of their row are dropped: rows are padded anew to the
    longest.
    """
    device = attention_mask.device
    batch, length = attention_mask.shape
    rows, columns = images.rows.to(device), images.columns.to(device)
    stays = attention_mask.long().cumsum(-1) > 0  # [B, S] from the first attended column on
    group = rows[:, None].expand_as(columns)
    stays[group[images.valid], columns[images.valid]] = False
    keep, keep_valid = selection.keep.to(device), selection.valid.to(device)
    stays[rows[:, None].expand_as(keep)[keep_valid], columns.gather(1, keep)[keep_valid]] = True

    origin_of = selection.slot_positions if policy != "median" else _median_positions(selection)
    extra = _appended(images, selection, origin_of.to(device), batch)
    here = torch.arange(length, device=device).expand(batch, -1)
    columns_of = torch.cat([here, extra.column], 1)
    origin = torch.cat([here, extra.origin], 1)
    used = torch.cat([stays, extra.valid], 1)
    # appended slots sort behind their image's last column, before the next one
    key = columns_of * (extra.valid.shape[1] + 1)
    key[:, length:] += 1 + torch.arange(extra.valid.shape[1], device=device)
    short = int(used.sum(-1).max())
    order = key.masked_fill(~used, -1).argsort(dim=-1, stable=True)[:, used.shape[1] - short :]
    if policy == "median" and keep.shape[1]:
        kept_columns = columns.gather(1, keep)[keep_valid]
        wanted = columns.gather(1, origin_of[:, : keep.shape[1]].clamp_min(0).to(device))[
            keep_valid
        ]
        origin[:, :length] = origin[:, :length].index_put(
            (rows[:, None].expand_as(keep)[keep_valid], kept_columns), wanted
        )
    return Compaction(
        index=order,
        valid=used.gather(1, order),
        columns=columns_of.gather(1, order),
        origin=origin.gather(1, order),
        length=length,
        appended=extra.valid.shape[1],
    )


def by_row(parts: list[Tensor], rows: list[int], batch: int) -> Tensor:
    """Per-image parts `[n_i, ...]` joined by batch row, in order, padded: `[batch, A, ...]`."""
    joined = [
        torch.cat([part for part, r in zip(parts, rows, strict=True) if r == row] or [parts[0][:0]])
        for row in range(batch)
    ]
    return pad_sequence(joined, batch_first=True)


@dataclass(frozen=True, eq=False)
class _Appended:
    column: Tensor  # [B, A] last column of the slot's image
    origin: Tensor  # [B, A] column whose position id the slot takes
    valid: Tensor  # [B, A]


def _appended(images: Images, selection: Selection, origin_of: Tensor, batch: int) -> _Appended:
    """Appended slots of all images, by row, in order."""
    parts = []
    for g, length in enumerate(images.lengths):
        slots = origin_of[g, selection.keep.shape[1] :]
        slots = slots[slots >= 0]
        columns = images.columns[g].to(slots.device)
        last = columns[length - 1].expand_as(slots)
        parts.append(torch.stack([last, columns[slots], torch.ones_like(slots)], -1))  # [n, 3]
    column, origin, valid = by_row(parts, images.rows.tolist(), batch).unbind(-1)
    return _Appended(column, origin, valid.bool())


def _median_positions(selection: Selection) -> Tensor:
    """Per slot the token whose position it takes: for merged ones the (lower) median member."""
    positions = selection.slot_positions.clone()
    if selection.merge is not None:
        slot, token, weight = selection.merge
        for g in range(len(positions)):
            for s in slot[g][weight[g] != 0].unique().tolist():
                members = token[g][(slot[g] == s) & (weight[g] != 0)]
                positions[g, s] = members.median()
    return positions
