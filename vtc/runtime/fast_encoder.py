"""The encoder of a patched model as one captured call: pixels in, tokens and signals out."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from vtc import dispatch, ops
from vtc.checks import Deferred, Problem, deferred
from vtc.runtime.aligning import Aligned
from vtc.runtime.compaction import Compaction
from vtc.runtime.compiling import compiled_blocks
from vtc.runtime.graphs import Graphs
from vtc.runtime.images import Images
from vtc.runtime.masked_cuts import Left
from vtc.runtime.probe import implementation, together
from vtc.types import Signal

if TYPE_CHECKING:
    from vtc.runtime.session import Session


@dataclass(frozen=True, eq=False)
class Encoded:
    """What an encoder gave.

    Attributes:
        features: `[T, D]`, what the stock model puts at `Images.places`.
        signals: what the method asked for.
        survivors: `bool[G, N]`, the tokens of patches that cuts left; None: none were cut.
        counts: how many those are of each image.
    """

    features: Tensor
    signals: dict[Signal, Tensor]
    survivors: Tensor | None = None
    counts: tuple[int, ...] = ()

    def into(self, embeds: Tensor, images: Images) -> Tensor:
        """Text embeddings `[B, S, D]` with the tokens in their places."""
        places = images.to(embeds.device).places
        return embeds.index_put((places[:, 0], places[:, 1]), self.features.to(embeds))

    def groups(self, images: Images, dtype: torch.dtype) -> Tensor:
        """The tokens in padded groups `[G, N, D]`, zeros on padding."""
        features, (groups, n) = self.features.to(dtype), images.columns.shape
        if len(features) == sum(images.lengths) == groups * n:
            return features.view(groups, n, -1)
        placed = images.to(features.device)
        index = placed.given[1 : 1 + groups * n].view(groups, n)
        return ops.compact(features.expand(groups, -1, -1), index, placed.valid)

    def shortened(self, text: Tensor, images: Images, compaction: Compaction) -> Tensor:
        """A short prompt `[B, L, D]` of text embeddings and tokens, zeros on padding; embeddings of
        the whole prompt are not made."""
        placed = images.to(text.device)
        at = compaction.gather(placed.at) if compaction.at is None else compaction.at  # [B, L]
        given = at > 0
        index, there = (x.view(1, -1) for x in (placed.given[at], given))
        tokens = ops.compact(self.features.to(text)[None], index, there).view_as(text)
        return torch.where((compaction.valid ^ given)[..., None], text, tokens)


@dataclass(frozen=True, eq=False)
class Pixels:
    """What an encoder is given.

    Attributes:
        key: what decides about a capture.
        name: of the pixels among the model's inputs.
        pixels: on the device.
        host: what says their sizes, on the CPU.
        kind: the implementation of attention.
    """

    key: tuple[Any, ...]
    name: str
    pixels: Tensor
    host: dict[str, Any]
    kind: str


class FastEncoder:
    """Captures the encoder once for each size of its pixels.

    Args:
        session: the patched model's state.
        graphs: holds what is captured.
        compiles: whether blocks are compiled, but for their attention, before they are captured.
    """

    def __init__(self, session: Session, graphs: Graphs, compiles: bool = False) -> None:
        self.session, self.graphs, self.compiles = session, graphs, compiles
        # which operations ran when a call was captured: no replay tells
        self._ran: dict[Any, dict[str, str]] = {}
        # tokens that cuts leave of each image, and what checks of numbers would say
        self._left: dict[Any, tuple[tuple[int, ...], list[Problem]]] = {}
        self.aligned = Aligned()

    def refusal(self, images: Images, inputs: Mapping[str, Any]) -> str | None:
        """Why this call's encoder is not captured; None if it is."""
        session, adapter = self.session, self.session.adapter
        if session.method.site == "pixels":
            return "the method resizes pixels on the host"
        if (reason := session.tower.mask_refusal(images, session.budget)) is not None:
            return reason
        if adapter.deepstack_layers:
            return "features of inner blocks go to the language model"
        if any(visual.video for visual in images.visuals):
            return "videos are encoded by the stock model"
        if any(adapter.blends(inputs, i, v) for i, v in enumerate(images.visuals)):
            return "one token is made of several patches by sizes of the canvas"
        return None

    def prepare(self, images: Images, inputs: Mapping[str, Any]) -> Pixels:
        """What is to be encoded. It reads sizes off the device: before that has work."""
        adapter = self.session.adapter
        (name,) = (n for n in adapter.pixel_inputs if inputs.get(n) is not None)
        host = {
            key: value.cpu() if isinstance(value, Tensor) else value
            for key, value in inputs.items()
            if key in adapter.visual_inputs and key not in (name, "mm_token_type_ids")
        }
        pixels = inputs[name]
        sizes = tuple(
            (key, tuple(value.flatten().tolist()) if isinstance(value, Tensor) else str(value))
            for key, value in sorted(host.items())
        )
        kind = implementation(self.session.tower.encoder.attentions[0])
        keep = repr(self.session.budget.keep) if self.session.tower.cuts is not None else None
        shape = tuple(pixels.shape)
        key = ("encoder", shape, pixels.dtype, sizes, images.lengths, kind, keep)
        return Pixels(key, name, pixels, host, kind)

    def __call__(self, images: Images, given: Pixels) -> Encoded:
        """Encode, or raise `CaptureError`."""
        adapter, tower, key = self.session.adapter, self.session.tower, given.key

        def encode(pixels: Tensor) -> tuple[Any, ...]:
            inputs, checks = {**given.host, given.name: pixels}, Deferred()
            with ExitStack() as stack:
                stack.enter_context(dispatch.using(self.session.kernels, ran))
                stack.enter_context(deferred(checks))
                stack.enter_context(self.session.recording(images, inputs, masked=True))
                if tower.encoder.packed and given.kind in ("sdpa", "eager"):
                    for attention in tower.encoder.attentions:
                        stack.enter_context(together(attention))
                stack.enter_context(self.aligned.within(tower.encoder.blocks))
                if self.compiles and self.graphs.capturing:
                    stack.enter_context(compiled_blocks(tower.encoder))
                features, signals = adapter.encode(inputs), tower.read_each()
            cuts = tower.masked
            left = None if cuts is None else cuts.left
            self._left[key] = (() if cuts is None else cuts.counts), checks.messages
            parts = [] if left is None else [left.survivors, left.patches, left.lengths]
            return features, signals, parts, checks.flags

        ran = self._ran.setdefault(key, {})
        with torch.no_grad():
            features, signals, left, flags = self.graphs.run(
                key, encode, [given.pixels], patient=True
            )
        self.session.ran.update(ran)
        counts, messages = self._left[key]
        self.graphs.forget(self._ran)
        self.graphs.forget(self._left)
        for flag, message in zip(flags, messages, strict=True):
            self.session.checks.add(flag, message)
        tower.replayed(images, {**given.host, given.name: given.pixels})
        if tower.masked is None or not left:
            return Encoded(features, signals)
        tower.masked.left = Left(*left)
        return Encoded(features, signals, tower.masked.left.survivors, counts)
