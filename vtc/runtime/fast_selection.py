"""What is decided before the LLM, and the short prompt made of it, as one captured call.

The prompt is padded on the left to a bucket; where its images stand is a number that is copied in,
so that texts of a bucket share what is captured.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn import functional as F

from vtc import dispatch
from vtc.checks import Deferred, deferred
from vtc.dispatch import constant
from vtc.runtime.deciding import decided
from vtc.runtime.fast_encoder import Encoded
from vtc.runtime.graphs import CaptureError, Graphs
from vtc.runtime.images import Images
from vtc.runtime.short import Full, Short, gather_groups
from vtc.types import ENCODER_ROW, LLM_HIDDEN, TEXT, Selection

if TYPE_CHECKING:
    from vtc.runtime.session import Session

_TEXT = 32  # texts are padded to multiples of this
_SELECTED = ("keep", "valid", "positions", "scores")
_SHORT = ("inputs_embeds", "attention_mask", "position_ids", "shift", "following", "visual")
_COMPACTED = ("index", "valid", "columns", "origin", "group", "first")


@dataclass(frozen=True)
class Staged:
    """A prompt on its way to the device, before the encoder has work there.

    Attributes:
        key: what decides about a capture.
        given: ids, mask and position ids, padded; where its images stand, as one tensor.
        padding: columns at the left of each row that are not the prompt's.
    """

    key: tuple[Any, ...]
    given: list[Tensor]
    padding: int


class FastSelection:
    """Captures decisions once for each layout of images and bucket of text.

    Args:
        session: the patched model's state.
        graphs: holds what is captured.
    """

    def __init__(self, session: Session, graphs: Graphs) -> None:
        self.session, self.graphs = session, graphs
        self._made: dict[Any, tuple[list[Selection], Short, list[str], dict[str, str]]] = {}

    def clear(self) -> None:
        """Forget what is no longer held."""
        self._made.clear()

    def refusal(self) -> str | None:
        """Why this method's decisions are not captured; None if they are."""
        session = self.session
        if any(need.name in ("image_key", LLM_HIDDEN, TEXT) for need in session.method.needs):
            return "the method needs more than the encoder gives"
        if session.tower.signals.draws:
            return "the method draws numbers on the host"
        steps = session.method.steps(session.budget)
        choosing = [s.method for s in steps if s.method.site == "llm_input"]
        if any(method.count == "adaptive" for method in choosing):
            return "how many tokens the method keeps depends on them"
        if len(choosing) > 1 and any(n.name == ENCODER_ROW for n in session.method.needs):
            return "a stage asks which crops the tokens are of that an earlier one left"
        if session.tower.cuts is not None and any(s.method.site == "llm_input" for s in steps):
            return "a stage chooses among what cuts inside the encoder left"
        return None

    def stage(
        self, images: Images, ids: Tensor, mask: Tensor, positions: Tensor, encoder: Any
    ) -> Staged:
        """Bring a prompt `[B, S]` to its bucket.

        Args:
            images: of the call.
            ids: `[B, S]`.
            mask: `[B, S]`.
            positions: `[(P,) B or 1, S]`.
            encoder: what decides about the encoder's capture.
        """
        session, rows = self.session, tuple(images.rows.tolist())
        visual = [0] * len(ids)
        for row, v in zip(rows, images.visuals, strict=True):
            visual[row] += v.tokens + len(v.newlines)
        text = ids.shape[1] - max(visual)
        padding = -text % _TEXT
        places = [(images.columns + padding).flatten()]
        for table, columns in ((images.newlines, 1), (images.places, 1)):
            table = table.clone()
            table[:, columns] += padding
            places.append(table.flatten())
        packed = torch.cat(places)
        if ids.is_cuda:
            packed = packed.pin_memory().to(ids.device, non_blocking=True)
        padded = [F.pad(x.to(ids.device), (padding, 0)) for x in (ids, mask, positions)]
        key = (
            "selection",
            encoder,
            tuple((tuple(x.shape), x.dtype) for x in padded),
            rows,
            len(packed),
            repr(session.budget.keep),  # 1 token is not all of them
            session.policy,
        )
        return Staged(key, [*padded, packed], padding)

    def __call__(
        self, images: Images, staged: Staged, encoded: Encoded
    ) -> tuple[list[Selection], Short]:
        """What each step left, and the short prompt.

        Args:
            images: of the call.
            staged: its prompt.
            encoded: its tokens and signals.

        Raises:
            CaptureError: it cannot be captured.
        """
        names = sorted(encoded.signals)
        made: dict[str, str] = {}

        def run(*given: Tensor) -> list[Tensor]:
            ids, mask, positions, packed, features, *signals = given
            there = _standing(images, packed)
            survivors = None if encoded.survivors is None else signals.pop()
            found = dict(zip(names, signals, strict=True))
            own = Encoded(features, found, survivors, encoded.counts)
            checks = Deferred()
            with dispatch.using(self.session.kernels, made), deferred(checks):
                left, short = self._decided(there, own, ids, mask, positions)
            short = replace(short, compaction=short.compaction.without(staged.padding))
            self._made[staged.key] = (left, short, checks.messages, made)
            return [*_tensors(left, short), *checks.flags]

        signals = [encoded.signals[name] for name in names]
        signals += [] if encoded.survivors is None else [encoded.survivors]
        inputs = [*staged.given, encoded.features, *signals]
        tensors = self.graphs.run(staged.key, run, inputs, patient=True)
        template, short, messages, ran = self._made[staged.key]
        self.session.ran.update(ran)
        self.graphs.forget(self._made)
        flags = tensors[len(tensors) - len(messages) :]
        for flag, message in zip(flags, messages, strict=True):
            self.session.checks.add(flag, message)
        length = staged.given[0].shape[1] - staged.padding
        return _rebuilt(template, short, tensors, images, length)

    def _decided(
        self, images: Images, encoded: Encoded, ids: Tensor, mask: Tensor, positions: Tensor
    ) -> tuple[list[Selection], Short]:
        session = self.session
        before, session.encoded = session.encoded, encoded
        session.prompt = None
        try:
            embeds = encoded.into(session.embedded(ids), images)
            found = decided(session, images, gather_groups(images, embeds), {})
            selection = _placed(found[-1] if found else session.everything(images), ids.device)
            if selection.merge is not None or selection.sends_cls:
                raise CaptureError("where merged tokens stand is found on the host")
            policy = session.policy if found else "keep"
            short = session.shorten(images, selection, Full(embeds), mask, positions, policy=policy)
        finally:
            session.encoded = before
        return found, short


def _placed(selection: Selection, device: torch.device) -> Selection:
    """A selection on the device: what is known on the host follows from sizes."""
    if selection.keep.device == device:
        return selection
    return replace(
        selection,
        keep=constant(selection.keep, device),
        valid=constant(selection.valid, device),
        positions=constant(selection.slot_positions, device),
    )


def _standing(images: Images, packed: Tensor) -> Images:
    """The images where `packed` says that they stand."""
    shapes = images.columns.shape, images.newlines.shape, images.places.shape
    parts = packed.split([shape.numel() for shape in shapes])
    columns, newlines, places = (p.view(s) for p, s in zip(parts, shapes, strict=True))
    device = packed.device
    found = replace(
        images,
        rows=constant(images.rows, device),
        valid=constant(images.valid, device),
        columns=columns,
        newlines=newlines,
        places=places,
    )
    there = replace(images)
    there._moved[device] = found
    return there


def _tensors(found: list[Selection], short: Short) -> list[Tensor]:
    """All that is on the device, in order."""
    selected = [getattr(s, name) for s in found for name in _SELECTED]
    shortened = [getattr(short, name) for name in _SHORT]
    return [
        x
        for x in (*selected, *shortened, *(getattr(short.compaction, name) for name in _COMPACTED))
        if isinstance(x, Tensor)
    ]


def _rebuilt(
    template: list[Selection],
    short: Short,
    tensors: list[Tensor],
    images: Images,
    length: int,
) -> tuple[list[Selection], Short]:
    """Decisions and the short prompt of the same shapes, with these tensors."""
    left = iter(tensors)

    def fresh(of: Any, names: tuple[str, ...]) -> Mapping[str, Any]:
        return {n: next(left) for n in names if isinstance(getattr(of, n), Tensor)}

    found = [replace(s, parent=images.parent, **fresh(s, _SELECTED)) for s in template]
    parts = fresh(short, _SHORT)
    compaction = replace(short.compaction, length=length, **fresh(short.compaction, _COMPACTED))
    return found, replace(short, compaction=compaction, **parts)
