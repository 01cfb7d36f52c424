"""What the language model is fed: whole, as the stock model has it, and short."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from vtc import ops
from vtc.dispatch import constant
from vtc.runtime.compaction import Compaction, Policy
from vtc.runtime.images import Images
from vtc.runtime.layer_stage import Placed, leading
from vtc.types import Selection


@dataclass(frozen=True, eq=False)
class Full:
    """What the stock base model would feed its language model, before compression.

    Attributes:
        embeds: `[B, S, D]`.
        deep: `[B, S, layers · D]`, what is added behind the first decoder layers, or None.
    """

    embeds: Tensor
    deep: Tensor | None = None

    @property
    def stacked(self) -> Tensor:
        """Both side by side: what belongs to a token is cut and merged together."""
        return self.embeds if self.deep is None else torch.cat([self.embeds, self.deep], -1)


@dataclass(frozen=True, eq=False)
class Short:
    """The language model's inputs after compression.

    Attributes:
        inputs_embeds: `[B, L, D]`.
        attention_mask: `[B, L]`.
        position_ids: `[(P,) B, L]`.
        shift: `[(P,) B, 1]`, how far positions moved down.
        following: `[B, 1]`, the position id that comes next.
        deep: `[B, L, layers · D]` or None.
        visual: `bool[B, L]`.
        compaction: how it was made.
        placed: where the visual tokens stand in it, where that is known already; see `placed_of`.
    """

    inputs_embeds: Tensor
    attention_mask: Tensor
    position_ids: Tensor
    shift: Tensor
    following: Tensor
    deep: Tensor | None
    visual: Tensor
    compaction: Compaction
    placed: Placed | None = None

    def deepstack(self, repeats: int = 1) -> dict[str, Any]:
        """The keyword inputs of a language model with DeepStack; each row repeated for beams."""
        if self.deep is None:
            return {}
        visual = self.visual.repeat_interleave(repeats, 0)
        deep = self.deep.repeat_interleave(repeats, 0)[visual]
        width = self.inputs_embeds.shape[-1]
        return {
            "visual_pos_masks": visual,
            "deepstack_visual_embeds": list(deep.split(width, -1)),
        }


def placed_of(
    images: Images, short: Short, width: int, lengths: tuple[int, ...] | None = None
) -> Placed:
    """Where the visual tokens stand in a short sequence, for cuts between decoder layers. Reads
    nothing off the device.

    Args:
        images: of the call.
        short: the sequence.
        width: no less than the tokens that are left of any image.
        lengths: how many are left of each, where the host knows.
    """
    compaction, device = short.compaction, short.inputs_embeds.device
    found, rows = images.to(device), tuple(images.rows.tolist())
    # what an entry is, or the token whose position it takes, as `Images.at` counts
    at = compaction.at if compaction.at is not None else found.at.gather(1, compaction.origin)
    groups, tokens = images.columns.shape
    first = constant(tuple(range(1, 1 + groups * tokens, tokens)), device)[:, None]
    group = _of_rows(compaction.group, found.rows, rows)
    own = group == constant(tuple(range(groups)), device)[:, None]
    even = lengths is not None and set(lengths) == {width}
    columns, valid = leading(*ops.packed_index(own, width), even)
    return Placed(
        columns=columns,
        valid=valid,
        index=(_of_rows(at, found.rows, rows).gather(1, columns) - first) * valid,
        parent=constant(images.parent, device),
        tokens=images.lengths,
        visual=short.visual,
        newlines=_newlines(images.newlines, at, groups * tokens),
        lengths=lengths,
        rows=rows,
    )


def _of_rows(x: Tensor, index: Tensor, rows: tuple[int, ...]) -> Tensor:
    """`x[index]`, where `rows` are the same numbers."""
    return x if rows == tuple(range(len(x))) else x[index]


def _newlines(lines: Tensor, at: Tensor, tokens: int) -> Tensor:
    """The newline tokens, as in `Images`, at their columns in the short sequence; behind all its
    entries if they are not left."""
    if not len(lines):
        return lines.to(at.device)
    own = torch.arange(1 + tokens, 1 + tokens + len(lines), device=at.device)
    row, of = (constant(part, at.device) for part in (lines[:, 0], lines[:, 2:]))
    found = at[row] == own[:, None]  # [M, L]
    column = torch.where(found.any(-1), found.int().argmax(-1), found.shape[1])
    return torch.cat([row[:, None], column[:, None], of], 1)


def cells_of(images: Images, placed: Placed) -> Tensor:
    """The grid (counted over crops, tiles and frames of all images), row and column of each entry
    of a sequence, `int64[B, S, 3]`; grid -1 for text."""
    tables, first = [], 0
    for visual in images.visuals:
        found = []
        for frames, h, w in visual.grids:
            places = torch.cartesian_prod(torch.arange(frames), torch.arange(h), torch.arange(w))
            found.append(places.view(-1, 3) + torch.tensor([first, 0, 0]))
            first += frames
        tables.append(torch.cat(found))
    table = pad_sequence(tables, batch_first=True).to(placed.index.device)
    cells = placed.index.new_full((*placed.visual.shape, 3), -1)
    rows = placed.parent[:, 1:].expand_as(placed.columns)[placed.valid]
    index = placed.index[..., None].expand(-1, -1, 3)
    cells[rows, placed.columns[placed.valid]] = table.gather(1, index)[placed.valid]
    return cells


def short_of(
    compaction: Compaction,
    embeds: Tensor,
    attention_mask: Tensor,
    position_ids: Tensor,
    policy: Policy,
    deep: Tensor | None = None,
) -> Short:
    """A short prompt.

    Args:
        compaction: how it is made.
        embeds: `[B, L, D]`, compacted.
        attention_mask: `[B, S]` of the whole prompt.
        position_ids: `[(P,) B or 1, S]` of the whole prompt.
        policy: what becomes of them.
        deep: `[B, L, layers · D]`, compacted, or None.
    """
    mask = compaction.mask(attention_mask)
    hidden = mask == 0
    ids = compaction.positions(position_ids, attention_mask, hidden, policy)
    highest = _last(ids, hidden)
    return Short(
        inputs_embeds=embeds,
        attention_mask=mask,
        position_ids=ids,
        shift=_last(position_ids, attention_mask == 0) - highest,
        following=_behind(highest),
        deep=deep,
        visual=compaction.group >= 0,
        compaction=compaction,
    )


def full_of(kwargs: Mapping[str, Any]) -> Full:
    """The embeddings among a language model's inputs, with what DeepStack adds later."""
    embeds, layers = kwargs["inputs_embeds"], kwargs.get("deepstack_visual_embeds")
    if not layers:
        return Full(embeds)
    where = kwargs["visual_pos_masks"].to(embeds.device)
    deep = embeds.new_zeros(*embeds.shape[:2], len(layers) * embeds.shape[-1])
    deep[where] = torch.cat([layer.to(embeds) for layer in layers], -1)
    return Full(embeds, deep)


def gather_groups(images: Images, embeds: Tensor) -> Tensor:
    """Visual tokens `[G, N, D]` out of rows `[B, S, D]`, zeros on padding."""
    placed = images.to(embeds.device)
    found = embeds[placed.rows[:, None], placed.columns]
    return found.masked_fill(~placed.valid[..., None], 0)


def with_merges(left: Selection, parts: Tensor, weight: Tensor, slots: Tensor) -> Selection:
    """A selection of kept tokens with what was merged into them between decoder layers.

    Args:
        left: over the original tokens of each image.
        parts: `int64[3, M]`: group, token that goes on and token that is part of it, both counted
            among those that reached the language model.
        weight: `float[M]`.
        slots: `int64[G, N]`, which original token each of those is.
    """
    group, into, part = parts.cpu()
    rank = left.mask().long().cumsum(-1) - 1
    slot, token = rank[group, slots[group, into]], slots[group, part]
    split = [(group == g).nonzero()[:, 0] for g in range(len(left.lengths))]
    columns = (
        pad_sequence([x[at] for at in split], batch_first=True)
        for x in (slot, token, weight.float().cpu())
    )
    slot, token, weight = columns
    return replace(left, merge=(slot, token, weight))


def following(position_ids: Tensor, mask: Tensor) -> Tensor:
    """What the next position id of each row would be, `[B, 1]`: behind the highest on any axis."""
    return _behind(_last(position_ids, mask == 0)).expand(len(mask), 1)


def _behind(highest: Tensor) -> Tensor:
    """The position id behind the highest of each axis, `[(P,) B, 1]` -> `[B, 1]`."""
    if highest.dim() == 3:
        # of four axes, the first counts tokens and turns nothing
        highest = highest[1 if len(highest) == 4 else 0 :].amax(0)
    return highest + 1


def _last(position_ids: Tensor, hidden: Tensor) -> Tensor:
    """The highest position id that is not hidden, `[(P,) B, 1]`."""
    return position_ids.masked_fill(hidden, -1).amax(-1, keepdim=True)
