"""From decisions to a shorter sequence: which entries, in which order, at which positions."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.utils.rnn import pad_sequence

from vtc import ops
from vtc.dispatch import constant
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
        group: `int64[B, L]`: the image that an entry belongs to, −1 for text and padding.
        length: S, but for `padding`.
        appended: A.
        padding: how many of the S at the left are not the caller's.
        at: `int64[B, L]`: what an entry is, as in `Images.at`, 0 on padding; None where slots are
            appended.
    """

    index: Tensor
    valid: Tensor
    columns: Tensor
    origin: Tensor
    group: Tensor
    length: int
    appended: int = 0
    padding: int = 0
    at: Tensor | None = None

    def gather(self, x: Tensor, appended: Tensor | None = None) -> Tensor:
        """`[B, S, ...]` and appended slots `[B, A, ...]` -> `[B, L, ...]`, zeros on padding."""
        source = x if appended is None else torch.cat([x, appended.to(x)], 1)
        return ops.compact(source, self.index, self.valid)

    def mask(self, attention_mask: Tensor) -> Tensor:
        """`[B, S]` -> `[B, L]`; appended slots are attended to."""
        slots = None
        if self.appended:
            slots = attention_mask.new_ones(len(attention_mask), self.appended)
        return self.gather(attention_mask, slots)

    def positions(
        self, position_ids: Tensor, attention_mask: Tensor, hidden: Tensor, policy: Policy
    ) -> Tensor:
        """Position ids `[(P,) B or 1, S]` -> `[(P,) B, L]`, 0 where an entry is `hidden`."""
        ids = position_ids.expand(*position_ids.shape[:-2], len(self.origin), -1)

        def at(columns: Tensor) -> Tensor:
            return ids.gather(-1, columns.expand(*ids.shape[:-1], -1))

        if policy != "renumber":
            short = at(self.origin)
        else:
            first = (attention_mask != 0).int().argmax(-1, keepdim=True)
            if ids.dim() == 2:
                short = at(first) + (~hidden).cumsum(-1) - 1
            else:
                short = repacked(at(self.origin), self.group, ~hidden, at(first)[..., 0].amax(0))
        return short.masked_fill(hidden, 0)

    def restore(self, hidden: Tensor) -> Tensor:
        """`[B, L, D]` -> `[B, S, D]`: every column takes the last entry at or before it.

        So what follows an image is predicted from its last surviving token, as in the short
        sequence.
        """
        # the last layer of a model spread over devices is elsewhere than its embeddings
        columns, valid = self.columns.to(hidden.device), self.valid.to(hidden.device)
        entry = torch.arange(columns.shape[1], device=hidden.device).expand_as(columns)
        first = valid.int().argmax(-1, keepdim=True)
        whole = self.padding + self.length
        last = hidden.new_full((len(hidden), whole), -1, dtype=torch.long)
        where = columns.masked_fill(~valid, 0)
        last.scatter_reduce_(1, where, entry.masked_fill(~valid, -1), "amax")
        last = torch.maximum(last.cummax(-1).values, first)[:, self.padding :]
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
    left = _left(images, keep, keep_valid)
    if len(images.newlines):
        taken = left
        if (slots := selection.positions) is not None:
            taken = _left(images, slots.to(device), slots.to(device) >= 0)
        left = torch.cat([left, _rows_alive(images, taken)])
    at = placed.at
    if (more := length - at.shape[1]) > 0:  # candidates of assisted decoding, run with the prompt
        at = F.pad(at, (0, more))
    stays = left[at] & (attention_mask.cumsum(-1) > 0)

    positions = _median_positions(selection) if policy == "median" else selection.positions
    if cls is None and (positions is None or positions.shape[1] == keep.shape[1]):
        width = int(stays.sum(-1).max()) if width is None else width
        index, valid = ops.packed_index(stays, width)
        origin = index
        if positions is not None:
            origin = _origins(images, at, keep, keep_valid, positions.to(device)).gather(1, index)
        at = ops.compact(at, index, valid)
        return Compaction(index, valid, index, origin, placed.owners[at], length, at=at)
    positions = selection.slot_positions if positions is None else positions
    parts = _appended(images, positions[:, keep.shape[1] :].cpu(), batch, cls)
    column, *behind = (part.to(device) for part in parts)
    # where nothing is kept as it is, slots stand where they belong, before a newline of their row
    alone = keep.shape[1] == 0 and cls is None
    behind = [behind[0] if alone else column, *behind]
    here = torch.arange(length, device=device).expand(batch, -1)
    origin = _origins(images, at, keep, keep_valid, positions[:, : keep.shape[1]].to(device))
    return _sorted((here, origin, placed.owners[at], stays, stays & False), behind, width)


def _left(images: Images, tokens: Tensor, valid: Tensor) -> Tensor:
    """Text and these tokens `[G, K]` of each image, counted as in `Images.at`: `bool[1 + G·N]`."""
    text = constant(torch.arange(1 + images.columns.numel()) == 0, tokens.device)
    # what is not valid marks text once more
    return text.scatter(0, _numbers(images, tokens, valid), True)


def _numbers(images: Images, tokens: Tensor, valid: Tensor) -> Tensor:
    """Tokens `[G, K]` of each image, counted as in `Images.at`; 0 where not valid: `[G·K]`."""
    groups, n = images.columns.shape
    first = constant(1 + n * torch.arange(groups)[:, None], tokens.device)
    return ((tokens + first) * valid).flatten()


def _rows_alive(images: Images, left: Tensor) -> Tensor:
    """Which newline tokens stay, `bool[M]`: those in whose row a token, or a slot, is left."""
    group, first, end = images.newlines[:, 2:].unbind(-1)
    ends = torch.stack([first, end]) + group * images.columns.shape[1]
    before, through = left.cumsum(0)[constant(ends, left.device)].unbind()
    return through > before


def _origins(images: Images, at: Tensor, keep: Tensor, valid: Tensor, positions: Tensor) -> Tensor:
    """The column whose position id each column takes, `int64[B, S]`: its own, but for kept tokens
    `[G, K]`, which take that of the tokens at `positions`. `at [B, S]` as in `Images`."""
    here = torch.arange(at.shape[1], device=at.device).expand_as(at)
    column = at.new_zeros(len(images.owners)).scatter(0, at.flatten(), here.flatten())
    takes = torch.arange(len(column), device=keep.device).scatter(
        0, _numbers(images, keep, valid), _numbers(images, positions.clamp_min(0), valid)
    )
    return torch.where(at > 0, column[takes[at]], here)


def longest(images: Images, selection: Selection, shape: torch.Size) -> int:
    """The length of the longest short row of a prompt of some shape.

    Counted from shapes alone: rows may be shorter, never longer.
    """
    batch, length = shape
    slots = selection.width
    rows = [length] * batch
    for row, visual in zip(images.rows.tolist(), images.visuals, strict=True):
        newlines = len(visual.newlines)
        kept = min(slots, visual.tokens) if selection.merge is None else slots
        # a newline stays with a token of its row
        rows[row] += kept - visual.tokens + min(newlines, kept) - newlines
    return max(rows)


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


def _sorted(there: tuple[Tensor, ...], behind: list[Tensor], width: int | None) -> Compaction:
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
    valid = used.gather(1, order)
    return Compaction(
        index=(order - more).clamp_min(0),
        valid=valid,
        columns=columns.gather(1, order),
        origin=origin.gather(1, order),
        group=group.gather(1, order).masked_fill(~valid, -1),
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


def _median_positions(selection: Selection) -> Tensor | None:
    """As `Selection.positions`: merged slots take that of the (lower) median member."""
    if selection.merge is None or not selection.merge[0].shape[1]:
        return selection.positions
    positions = selection.slot_positions
    slot, token, weight = (part.to(positions.device) for part in selection.merge)
    used, width = weight != 0, max(selection.lengths)
    # members sorted by slot, then token, padding last
    key = torch.where(used, slot * width + token, positions.shape[1] * width)
    members = key.sort(-1).values % width
    count = torch.zeros_like(positions).scatter_add_(1, slot, used.long())
    start = count.cumsum(-1) - count
    middle = start + (count - 1).clamp_min(0) // 2
    return torch.where(count > 0, members.gather(1, middle.clamp_max(key.shape[1] - 1)), positions)
