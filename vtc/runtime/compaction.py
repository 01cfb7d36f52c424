"""From decisions to a shorter sequence: which entries, in which order, at which positions."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F
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
        group: `int64[B, L]`: the image that an entry belongs to, −1 for text.
        first: `int64[B, 1]`: the first original column that is attended to.
        length: S.
        appended: A.
    """

    index: Tensor
    valid: Tensor
    columns: Tensor
    origin: Tensor
    group: Tensor
    first: Tensor
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
        """Position ids `[(P,) B or 1, S]` -> `[(P,) B, L]`; `mask` is the compacted one."""
        batch = len(self.origin)
        rows = torch.arange(batch, device=self.origin.device)[:, None]
        ids = position_ids.expand(*position_ids.shape[:-2], batch, -1)
        if policy != "renumber":
            short = ids[..., rows, self.origin]
        elif ids.dim() == 2:
            short = ids[rows, self.first] + mask.long().cumsum(-1) - 1
        else:
            start = ids[..., rows, self.first][..., 0].amax(0)
            short = repacked(ids[..., rows, self.origin], self.group, mask, start)
        return short.masked_fill(mask == 0, 0)

    def without(self, padding: int) -> Compaction:
        """The same, told in rows without so many columns at their left, none of which is used."""
        named = {
            name: (getattr(self, name) - padding).clamp_min(0)
            for name in ("index", "columns", "origin", "first")
        }
        return replace(self, **named, length=self.length - padding)

    def restore(self, hidden: Tensor) -> Tensor:
        """`[B, L, D]` -> `[B, S, D]`: every column takes the last entry at or before it.

        So what follows an image is predicted from its last surviving token, as in the short
        sequence.
        """
        # the last layer of a model spread over devices is elsewhere than its embeddings
        columns, valid = self.columns.to(hidden.device), self.valid.to(hidden.device)
        entry = torch.arange(columns.shape[1], device=hidden.device).expand_as(columns)
        first = valid.int().argmax(-1, keepdim=True)
        last = hidden.new_full((len(hidden), self.length), -1, dtype=torch.long)
        where = columns.masked_fill(~valid, 0)
        last.scatter_reduce_(1, where, entry.masked_fill(~valid, -1), "amax")
        last = torch.maximum(last.cummax(-1).values, first)
        return ops.compact(hidden, last, torch.ones_like(last, dtype=torch.bool))


def repacked(ids: Tensor, group: Tensor, mask: Tensor, start: Tensor) -> Tensor:
    """M-RoPE ids `[P, B, L]` without gaps: text counts on, the tokens of an image keep their order
    on each axis, and what follows it starts behind the furthest of them.

    With four rows, the first counts all tokens.
    """
    device, axes = ids.device, slice(1 if len(ids) == 4 else 0, None)
    ids, group, mask = ids.cpu(), group.cpu(), mask.cpu().bool()
    out = torch.zeros_like(ids)
    for b, following in enumerate(start.tolist()):
        (entries,) = mask[b].nonzero(as_tuple=True)
        if len(ids) == 4:
            out[0, b, entries] = following + torch.arange(len(entries))
        of, counts = group[b, entries].unique_consecutive(return_counts=True)
        for g, run in zip(of.tolist(), entries.split(counts.tolist()), strict=True):
            if g < 0:
                out[axes, b, run] = following + torch.arange(len(run))
            else:
                for axis in range(*axes.indices(len(ids))):
                    ranks = ids[axis, b, run].unique(return_inverse=True)[1]
                    out[axis, b, run] = following + ranks
            following = int(out[axes, b, run].max()) + 1
    return out.to(device)


def plan(
    images: Images,
    selection: Selection,
    attention_mask: Tensor,
    policy: Policy,
    width: int | None = None,
) -> Compaction:
    """Lay out the short sequence: text and kept tokens in order, appended slots behind their image.

    Columns that are padding at the left of their row are dropped: rows are padded anew, to the
    longest or to `width`, which must be at least that.
    """
    device = attention_mask.device
    batch, length = attention_mask.shape
    selection, cls = without_cls(selection)
    placed = images.to(device)
    keep, keep_valid = selection.keep.to(device), selection.valid.to(device)
    # each group's scratch column S takes what is not valid
    row = placed.rows[:, None]
    visual = placed.columns.masked_fill(~placed.valid, length)
    kept = placed.columns.gather(1, keep).masked_fill(~keep_valid, length)
    stays = torch.ones(batch, length + 1, dtype=torch.bool, device=device)
    # values on the device: plain ones would be copied there
    stays.index_put_((row, visual), stays.new_zeros(()))
    stays.index_put_((row, kept), stays.new_ones(()))
    if len(placed.newlines):
        stays[placed.newlines[:, 0], placed.newlines[:, 1]] = _rows_alive(placed, selection)
    stays = stays[:, :length] & (attention_mask.long().cumsum(-1) > 0)
    group = torch.full((batch, length + 1), -1, device=device)
    group[row, visual] = torch.arange(len(visual), device=device)[:, None].expand_as(visual)

    positions = _median_positions(selection) if policy == "median" else selection.slot_positions
    origin = torch.arange(length + 1, device=device).repeat(batch, 1)
    at = positions[:, : keep.shape[1]].clamp_min(0).to(device)
    origin[row, kept] = placed.columns.gather(1, at)
    first = (attention_mask != 0).int().argmax(-1, keepdim=True)
    origin, group = origin[:, :length], group[:, :length]
    if cls is None and positions.shape[1] == keep.shape[1]:
        width = int(stays.sum(-1).max()) if width is None else width
        index, valid = ops.packed_index(stays, width)
        places = index, origin.gather(1, index), group.gather(1, index)
        return Compaction(index, valid, *places, first=first, length=length, appended=0)
    parts = _appended(images, positions[:, keep.shape[1] :].cpu(), batch, cls)
    column, *behind = (part.to(device) for part in parts)
    # where nothing is kept as it is, slots stand where they belong, before a newline of their row
    alone = keep.shape[1] == 0 and cls is None
    behind = [behind[0] if alone else column, *behind]
    here = torch.arange(length, device=device).expand(batch, -1)
    return _sorted((here, origin, group, stays, stays & False), behind, first, width)


def without_cls(selection: Selection) -> tuple[Selection, Tensor | None]:
    """A selection without the [CLS] that it sends, and the token of each group whose position that
    takes, `int64[G]` on the CPU; None: it sends none."""
    if not selection.sends_cls:
        return selection, None
    merge = selection.merge
    if merge is not None:
        slot, token, weight = merge
        merge = ((slot - 1).clamp_min(0), token, weight)
    positions = selection.slot_positions
    rest = replace(
        selection,
        keep=selection.keep[:, 1:],
        valid=selection.valid[:, 1:],
        positions=positions[:, 1:],
        merge=merge,
        sends_cls=False,
    )
    return rest, positions[:, 0].cpu()


def _sorted(
    there: tuple[Tensor, ...], behind: list[Tensor], first: Tensor, width: int | None
) -> Compaction:
    """Original columns and appended slots as one sequence; both as their column, the column whose
    position they take, their image, whether they are used, and whether they stand before it."""
    length, appended = there[0].shape[1], behind[0].shape[1]
    columns, origin, group, used, before = (
        torch.cat([a, b.to(a.dtype)], 1) for a, b in zip(there, behind, strict=True)
    )
    # appended slots sort behind their column, before the next one, or before their own
    key = columns * (2 * appended + 1) + appended
    key[:, length:] += 1 + torch.arange(appended, device=key.device)
    key = torch.where(before, key - 1 - appended, key)
    width = int(used.sum(-1).max()) if width is None else width
    if (more := max(width - used.shape[1], 0)) > 0:
        key, used, columns, origin, group = (
            F.pad(x, (more, 0)) for x in (key, used, columns, origin, group)
        )
    order = key.masked_fill(~used, -1).argsort(dim=-1, stable=True)[:, used.shape[1] - width :]
    return Compaction(
        index=(order - more).clamp_min(0),
        valid=used.gather(1, order),
        columns=columns.gather(1, order),
        origin=origin.gather(1, order),
        group=group.gather(1, order),
        first=first,
        length=length,
        appended=appended,
    )


def by_row(parts: list[Tensor], rows: Tensor, batch: int) -> Tensor:
    """Per-image parts `[n_i, ...]` joined by batch row, in order, padded: `[batch, A, ...]`."""
    of_row: list[list[Tensor]] = [[parts[0][:0]] for _ in range(batch)]
    for part, row in zip(parts, rows.tolist(), strict=True):
        of_row[row].append(part)
    return pad_sequence([torch.cat(found) for found in of_row], batch_first=True)


def _appended(images: Images, tokens: Tensor, batch: int, cls: Tensor | None) -> tuple[Tensor, ...]:
    """Appended slots by row and in order, each `[B, A]`: their column, the column whose position
    they take, their image, which exist, and which stand before their column. `tokens [G, A_g]` on
    the CPU names the token of each group whose position a slot takes, `cls [G]` that of its [CLS],
    which comes first and stands before the image."""
    parts = []
    for g, slots in enumerate(tokens):
        slots, places = slots[slots >= 0], images.columns[g]
        first = slots[:0] if cls is None else cls[g : g + 1]
        column = torch.cat(
            [places[:1].expand_as(first), places[images.lengths[g] - 1].expand_as(slots)]
        )
        slots = torch.cat([first, slots])
        before = torch.arange(len(slots)) < len(first)
        image = torch.full_like(slots, g)
        rows = [column, places[slots], image, torch.ones_like(slots), before.long()]
        parts.append(torch.stack(rows, -1))
    return by_row(parts, images.rows, batch).unbind(-1)


def _rows_alive(placed: Images, selection: Selection) -> Tensor:
    """Which newline tokens stay, `bool[M]`: those in whose row a token, or a slot, is left."""
    device = placed.newlines.device
    slots = selection.slot_positions.to(device)
    there = torch.zeros(len(slots), placed.columns.shape[1] + 1, dtype=torch.long, device=device)
    there.scatter_(1, slots.masked_fill(slots < 0, placed.columns.shape[1]), 1)
    before = F.pad(there[:, :-1].cumsum(-1), (1, 0))
    _, _, group, first, end = placed.newlines.unbind(-1)
    return before[group, end] > before[group, first]


def _median_positions(selection: Selection) -> Tensor:
    """Per slot the token whose position it takes: for merged ones the (lower) median member."""
    positions = selection.slot_positions
    if selection.merge is None or not selection.merge[0].shape[1]:
        return positions
    slot, token, weight = (part.to(positions.device) for part in selection.merge)
    used, width = weight != 0, max(selection.lengths)
    # members sorted by slot, then token, padding last
    key = torch.where(used, slot * width + token, positions.shape[1] * width)
    members = key.sort(-1).values % width
    count = torch.zeros_like(positions).scatter_add_(1, slot, used.long())
    start = count.cumsum(-1) - count
    middle = start + (count - 1).clamp_min(0) // 2
    return torch.where(count > 0, members.gather(1, middle.clamp_max(key.shape[1] - 1)), positions)
