"""Sums of tokens, or of encoder features, and [CLS] tokens in a prompt's embeddings."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from vtc.runtime.compaction import by_row, without_cls
from vtc.runtime.images import Images
from vtc.runtime.short import gather_groups
from vtc.types import CLS_FEATURES, Selection

if TYPE_CHECKING:
    from vtc.runtime.session import Session


def merged(
    session: Session, images: Images, selection: Selection, embeds: Tensor
) -> tuple[Tensor, Tensor]:
    """Appended slots by row `[B, A, D]`, the [CLS] of an image first, and the embeddings
    `[B, S, D]` with sums in the place of kept tokens into which others were merged.

    Encoder features are summed without their gradient.
    """
    rest, adapter = without_cls(selection)[0], session.adapter
    slots = rest.apply(gather_groups(images, embeds))  # [G, S, D]
    if rest.merged == "encoder" and rest.merge is not None and adapter.projects:
        features = _at_tap(session, "encoder_features").to(embeds.device)
        made = adapter.project(rest.apply(features)).to(slots)
        slots = torch.where(_sums(rest)[..., None].to(slots.device), made, slots)
    kept = rest.keep.shape[1]
    filled = rest.slot_positions[:, kept:].cpu() >= 0
    parts = [s[where] for s, where in zip(slots[:, kept:], filled, strict=True)]
    if selection.sends_cls:
        cls = adapter.project(_at_tap(session, CLS_FEATURES)).to(embeds)
        parts = [torch.cat(pair) for pair in zip(cls, parts, strict=True)]
    return by_row(parts, images.rows, len(embeds)), with_slots(images, rest, embeds, slots)


def _at_tap(session: Session, name: str) -> Tensor:
    """What the encoder gave in the call under way, `[G, N, D]`."""
    needs = tuple(signal for signal in session.method.needs if signal.name == name)
    return next(iter(session.signals(needs[:1]).values()))


def _sums(selection: Selection) -> Tensor:
    """Which slots are sums, `bool[G, S]`."""
    sums = torch.zeros(selection.slot_positions.shape, dtype=torch.bool)
    if selection.merge is None:
        return sums
    slot, _, weight = (part.cpu() for part in selection.merge)
    group = torch.arange(len(sums))[:, None].expand_as(slot)
    return sums.index_put((group, slot), weight != 0, accumulate=True)


def with_slots(images: Images, selection: Selection, embeds: Tensor, slots: Tensor) -> Tensor:
    """Kept tokens into which others were merged, at their own columns."""
    if not selection.keep.shape[1]:
        return embeds
    placed = images.to(embeds.device)
    valid = selection.valid.to(embeds.device)
    keep = selection.keep.to(embeds.device)
    columns = placed.columns.gather(1, keep)[valid]
    rows = placed.rows[:, None].expand_as(keep)[valid]
    return embeds.index_put((rows, columns), slots[:, : keep.shape[1]][valid])
