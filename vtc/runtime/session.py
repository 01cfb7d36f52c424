"""One patched model: its method, its last decision, and the step from full inputs to short ones."""

from __future__ import annotations

import inspect
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from vtc.adapters.base import Adapter
from vtc.errors import InputError, UnsupportedModeError
from vtc.methods.base import Method
from vtc.runtime.clock import Clock
from vtc.runtime.compaction import Compaction, Policy, by_row, plan
from vtc.runtime.images import Images, find_images
from vtc.runtime.probe import EncoderSignals
from vtc.types import Budget, Selection, Tokens


@dataclass
class Call:
    """What is remembered of the last call that had images."""

    images: Images
    selection: Selection
    clock: Clock
    new_tokens: int | None = None
    kv_bytes: int | None = None


@dataclass(frozen=True, eq=False)
class Short:
    """The language model's inputs after compression; `shift` is how far positions moved down."""

    inputs_embeds: Tensor
    attention_mask: Tensor
    position_ids: Tensor
    shift: Tensor
    compaction: Compaction


class _Captured(Exception):
    def __init__(self, kwargs: dict[str, Any]) -> None:
        self.kwargs = kwargs


class Session:
    """State shared by the seams of one patched model.

    Args:
        adapter: describes the model.
        method: decides.
        budget: how much is kept.
        policy: what becomes of position ids, already resolved from `"published"`.
        seed: for methods that draw.
    """

    def __init__(
        self, adapter: Adapter, method: Method, budget: Budget, policy: Policy, seed: int
    ) -> None:
        self.adapter = adapter
        self.method = method
        self.budget = budget
        self.policy: Policy = policy
        self.seed = seed
        self.signals = EncoderSignals(adapter.encoder(), method.needs)
        self.last: Call | None = None

    def images(self, inputs: Mapping[str, Any], input_ids: Tensor) -> Images:
        """The images among a call's inputs; refuses what would change the encoder's features."""
        if inputs.get("vision_feature_layer") is not None:
            raise UnsupportedModeError(
                "vision_feature_layer was given in a call, expected it in model.config only: set "
                "it there before vtc.patch"
            )
        return find_images(self.adapter, inputs, input_ids)

    def note(self, images: Images, selection: Selection, clock: Clock) -> Call:
        """Remember a decision as the last call's."""
        self.last = Call(images, selection, clock)
        return self.last

    def keeps_all(self, images: Images) -> bool:
        """Whether the budget leaves every image whole, so that nothing has to run."""
        return self.budget.keeps_all(images.lengths)

    def decide(self, images: Images, features: Tensor, inputs: Mapping[str, Any]) -> Selection:
        """Run the method on padded groups of tokens `[G, N, D]`."""
        signals = self.signals.read(images.columns.shape[1])
        if any(s.name == "image_key" for s in self.method.needs):
            pixels = self.adapter.pixels(inputs)
            signals["image_key"] = torch.tensor([_key(p) for p in pixels])
        tokens = Tokens(
            features=features,
            valid=images.valid.to(features.device),
            grid=images.grids,
            parent=images.parent,
            signals=signals,
            seed=self.seed,
        )
        with torch.no_grad():
            return self.method.select(tokens, self.budget)

    def shorten(
        self,
        images: Images,
        selection: Selection,
        embeds: Tensor,
        attention_mask: Tensor,
        position_ids: Tensor,
        small: list[Tensor] | None = None,
    ) -> Short:
        """Apply a decision to full embeddings `[B, S, D]`, mask `[B, S]` and position ids.

        `small` holds each image's tokens when they are not in `embeds` (the pixel site).
        """
        compaction = plan(images, selection, attention_mask, self.policy)
        batch, kept = len(embeds), selection.keep.shape[1]
        appended = None
        if small is not None:
            appended = by_row(small, images.rows.tolist(), batch)
        elif selection.merge is not None:
            slots = selection.apply(gather_groups(images, embeds))  # [G, S, D]
            parts = [
                s[kept:][p[kept:] >= 0]
                for s, p in zip(slots, selection.slot_positions, strict=True)
            ]
            appended = by_row(parts, images.rows.tolist(), batch)
            embeds = _replace_kept(images, selection, embeds, slots)
        mask = compaction.mask(attention_mask)
        short_ids = compaction.positions(position_ids, mask, self.policy)
        return Short(
            inputs_embeds=compaction.gather(embeds, appended),
            attention_mask=mask,
            position_ids=short_ids,
            shift=position_ids[..., -1:] - short_ids[..., -1:],
            compaction=compaction,
        )

    def encode_small(
        self, images: Images, selection: Selection, inputs: Mapping[str, Any]
    ) -> list[Tensor]:
        """Each image's tokens when the method resizes the image itself."""
        resize: Any = self.method
        slots = selection.slots.tolist()
        sizes = [resize.size(grid, n) for grid, n in zip(images.grids, slots, strict=True)]
        return self.adapter.encode_resized(inputs, sizes)

    def capture(self, inputs: Mapping[str, Any], clock: Clock) -> dict[str, Any]:
        """What the stock base model would feed its language model, which is not run."""
        names = inspect.signature(self.adapter.base.forward).parameters
        given = {k: v for k, v in inputs.items() if k in names and v is not None}

        def stop(module: Any, args: Any, kwargs: dict[str, Any]) -> None:
            raise _Captured(kwargs)

        hook = self.adapter.language_model.register_forward_pre_hook(
            stop, with_kwargs=True, prepend=True
        )
        try:
            with self.signals.recording():
                self.adapter.base(**given)
        except _Captured as captured:
            clock.mark("encoded")
            return captured.kwargs
        finally:
            hook.remove()
        raise InputError("the model never called its language model; expected a stock forward")


def gather_groups(images: Images, embeds: Tensor) -> Tensor:
    """Visual tokens `[G, N, D]` out of rows `[B, S, D]`, zeros on padding."""
    rows, columns = images.rows.to(embeds.device), images.columns.to(embeds.device)
    return embeds[rows[:, None], columns] * images.valid.to(embeds.device)[..., None]


def _replace_kept(images: Images, selection: Selection, embeds: Tensor, slots: Tensor) -> Tensor:
    """Kept tokens into which others were merged, at their own columns."""
    if not selection.keep.shape[1]:
        return embeds
    valid = selection.valid.to(embeds.device)
    keep = selection.keep.to(embeds.device)
    columns = images.columns.to(embeds.device).gather(1, keep)[valid]
    rows = images.rows.to(embeds.device)[:, None].expand_as(keep)[valid]
    return embeds.index_put((rows, columns), slots[:, : keep.shape[1]][valid])


def _key(pixels: Tensor) -> int:
    """A number that depends on the picture alone, not on its place in a batch."""
    return zlib.crc32(pixels.detach().float().cpu().contiguous().numpy().tobytes())
