"""What is decided before the LLM, and the short prompt made of it, as one captured call.

The prompt is padded on the left to a bucket; where its images stand is a number that is copied in,
so that texts of a bucket share what is captured.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from vtc import dispatch
from vtc.checks import Deferred, Problem, deferred
from vtc.dispatch import constant
from vtc.runtime.compaction import longest
from vtc.runtime.deciding import decided
from vtc.runtime.fast_encoder import Encoded
from vtc.runtime.graphs import CaptureError, Graphs
from vtc.runtime.images import Images
from vtc.runtime.short import Short, placed_of, short_of
from vtc.scorers import RandomScores
from vtc.types import ENCODER_ROW, LLM_HIDDEN, TEXT, Selection, Signal, Tokens

if TYPE_CHECKING:
    from vtc.runtime.session import Session

_TEXT = 32  # texts are padded to multiples of this
_SELECTED = ("keep", "valid", "positions", "scores")
_SHORT = ("inputs_embeds", "attention_mask", "position_ids", "shift", "following", "visual")
# of `Images`, the same wherever they stand
_BY_SIZE = ("rows", "valid", "owners", "given")
_COMPACTED = ("index", "valid", "columns", "origin", "group")
_PLACED = ("columns", "valid", "index", "newlines")


@dataclass(frozen=True)
class Staged:
    """A prompt on its way to the device, before the encoder has work there.

    Attributes:
        key: what decides about a capture.
        given: `int64[3 + P, B, S]`: ids, mask, what stands in each column (as `Images.at`) and
            position ids, padded.
        kinds: types of mask and position ids.
        axes: P, if there are such.
        padding: columns at the left of each row that are not the prompt's.
        drawn: signals that are random numbers.
    """

    key: tuple[Any, ...]
    given: Tensor
    kinds: tuple[torch.dtype, torch.dtype]
    axes: tuple[int, ...]
    padding: int
    drawn: Mapping[Signal, Tensor] = field(default_factory=dict)

    def parts(self, given: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Ids, mask, what stands in each column `[B, S]`, and position ids `[(P,) B, S]`."""
        mask, positions = self.kinds
        ids = given[3:].view(*self.axes, *given.shape[1:])
        return given[0], given[1].to(mask), given[2], ids.to(positions)


class FastSelection:
    """Captures decisions once for each layout of images and bucket of text.

    Args:
        session: the patched model's state.
        graphs: holds what is captured.
    """

    def __init__(self, session: Session, graphs: Graphs) -> None:
        self.session, self.graphs = session, graphs
        self._made: dict[Any, tuple[list[Selection], Short, list[Problem], dict[str, str]]] = {}

    def clear(self) -> None:
        """Forget what is no longer held."""
        self._made.clear()

    def refusal(self) -> str | None:
        """Why this method's decisions are not captured; None if they are."""
        session = self.session
        if any(need.name in ("image_key", LLM_HIDDEN, TEXT) for need in session.method.needs):
            return "the method needs more than the encoder gives"
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
        at = images.at.pin_memory() if ids.is_cuda else images.at
        parts = [x.to(ids.device, non_blocking=True) for x in (ids, mask, at, positions)]
        # one tensor: each would be copied by itself
        given = torch.cat([_rows(x.long(), ids.shape) for x in parts])
        if padding:
            zeros = constant(torch.zeros(1, 1, padding, dtype=torch.int64), ids.device)
            given = torch.cat([zeros.expand(*given.shape[:2], -1), given], -1)
        kinds, axes = (mask.dtype, positions.dtype), tuple(positions.shape[:-2])
        key = (
            "selection",
            encoder,
            tuple(given.shape),
            kinds,
            axes,
            rows,
            repr(session.budget.keep),  # 1 token is not all of them
            session.policy,
        )
        return Staged(key, given, kinds, axes, padding, self._drawn(images, ids.device))

    def _drawn(self, images: Images, device: torch.device) -> dict[Signal, Tensor]:
        """The signals that are drawn, from numbers of the pixels that are known already."""
        draws = [s for s in self.session.tower.signals.draws if s in self.session.method.needs]
        if not draws:
            return {}
        tokens = Tokens(
            features=torch.zeros(*images.valid.shape, 0),
            valid=images.valid,
            grid=images.grids,
            parent=images.parent,
            signals={"image_key": self.session.tower.keys(images, {})},
            seed=self.session.seed,
            counted=images.lengths,
        )
        scores = RandomScores()(tokens)[:, None]
        if device.type == "cuda":
            scores = scores.pin_memory().to(device, non_blocking=True)
        return dict.fromkeys(draws, scores)

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
        known, length = {**encoded.signals, **staged.drawn}, images.at.shape[1]
        names = sorted(known, key=repr)
        made: dict[str, str] = {}

        def run(*given: Tensor) -> list[Tensor]:
            prompt, features, *signals = given
            survivors = None if encoded.survivors is None else signals.pop()
            found = dict(zip(names, signals, strict=True))
            own = Encoded(features, found, survivors, encoded.counts)
            checks = Deferred()
            with dispatch.using(self.session.kernels, made), deferred(checks):
                left, short = self._decided(images, own, *staged.parts(prompt))
            self._made[staged.key] = (left, short, checks.messages, made)
            return [*_tensors(left, short), *checks.flags]

        signals = [known[name] for name in names]
        signals += [] if encoded.survivors is None else [encoded.survivors]
        inputs = [staged.given, encoded.features, *signals]
        tensors = self.graphs.run(staged.key, run, inputs, patient=True)
        template, short, messages, ran = self._made[staged.key]
        if not self.graphs.holds(staged.key):
            del self._made[staged.key]  # its tensors would be kept, and it is made in each call
        self.session.ran.update(ran)
        self.graphs.forget(self._made)
        flags = tensors[len(tensors) - len(messages) :]
        for flag, message in zip(flags, messages, strict=True):
            self.session.checks.add(flag, message)
        compaction = replace(short.compaction, length=length, padding=staged.padding, at=None)
        return _rebuilt(template, replace(short, compaction=compaction), tensors, images)

    def _decided(
        self,
        images: Images,
        encoded: Encoded,
        ids: Tensor,
        mask: Tensor,
        at: Tensor,
        positions: Tensor,
    ) -> tuple[list[Selection], Short]:
        session, images = self.session, _standing(images, at)
        embedding: Any = session.adapter.model.get_input_embeddings()
        before, session.encoded = session.encoded, encoded
        session.prompt = None
        try:
            groups = encoded.groups(images, embedding.weight.dtype)
            found = decided(session, images, groups, {})
            selection = _on(found[-1] if found else session.everything(images), ids.device)
            if selection.merge is not None or selection.sends_cls:
                raise CaptureError("where merged tokens stand is found on the host")
            policy = session.policy if found else "keep"
            compaction = session.planned(images, selection, mask, policy)
            text = session.embedded(compaction.gather(ids))
            embeds = encoded.shortened(text, images, compaction)
            short = short_of(compaction, embeds, mask, positions, policy)
            if session.acts_later:
                placed = placed_of(images, short, selection.width, self._known(images, encoded))
                rows = longest(images, selection, mask.shape)
                short = replace(short, placed=replace(placed, longest=rows))
        finally:
            session.encoded = before
        return found, short

    def _known(self, images: Images, encoded: Encoded) -> tuple[int, ...] | None:
        """How many tokens of each image reach the language model, where sizes tell."""
        steps = self.session.method.steps(self.session.budget)
        choosing = [step for step in steps if step.method.site == "llm_input"]
        if not choosing:
            return encoded.counts or images.lengths
        last = choosing[-1]
        if last.method.count != "exact":
            return None
        return tuple(last.budget.counts(images.lengths, images.parent).tolist())


def _rows(x: Tensor, shape: torch.Size) -> Tensor:
    """`[(P,) B or 1, S]` -> `[P or 1, B, S]`."""
    return x.expand(*x.shape[:-2], *shape).view(-1, *shape)


def _on(selection: Selection, device: torch.device) -> Selection:
    """A selection on the device: what is known on the host follows from sizes."""
    if selection.keep.device == device:
        return selection
    return replace(
        selection,
        keep=constant(selection.keep, device),
        valid=constant(selection.valid, device),
        positions=None if selection.positions is None else constant(selection.positions, device),
    )


def _standing(images: Images, at: Tensor) -> Images:
    """The images where `at` says that they stand."""
    tables: dict[str, Any] = {name: constant(getattr(images, name), at.device) for name in _BY_SIZE}
    there = replace(images)
    there._moved[at.device] = replace(images, at=at, **tables)
    return there


def _tensors(found: list[Selection], short: Short) -> list[Tensor]:
    """All that is on the device, in order."""
    selected = [getattr(s, name) for s in found for name in _SELECTED]
    shortened = [getattr(short, name) for name in _SHORT]
    compacted = [getattr(short.compaction, name) for name in _COMPACTED]
    placed = [getattr(short.placed, name) for name in _PLACED] if short.placed else []
    return [x for x in (*selected, *shortened, *compacted, *placed) if isinstance(x, Tensor)]


def _rebuilt(
    template: list[Selection],
    short: Short,
    tensors: list[Tensor],
    images: Images,
) -> tuple[list[Selection], Short]:
    """Decisions and the short prompt of the same shapes, with these tensors."""
    left = iter(tensors)

    def fresh(of: Any, names: tuple[str, ...]) -> Mapping[str, Any]:
        return {n: next(left) for n in names if isinstance(getattr(of, n), Tensor)}

    found = [replace(s, parent=images.parent, **fresh(s, _SELECTED)) for s in template]
    parts = fresh(short, _SHORT)
    compaction = replace(short.compaction, **fresh(short.compaction, _COMPACTED))
    placed = short.placed
    if placed is not None:
        placed = replace(placed, visual=parts["visual"], **fresh(placed, _PLACED))
    return found, replace(short, compaction=compaction, placed=placed, **parts)
