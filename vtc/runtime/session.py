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
from vtc.errors import InputError, UnsupportedModeError, VtcError
from vtc.methods.base import Method
from vtc.runtime.clock import Clock
from vtc.runtime.compaction import Compaction, Policy, by_row, plan
from vtc.runtime.images import Images, find_images
from vtc.runtime.probe import EncoderSignals
from vtc.types import Budget, Selection, Tokens


@dataclass
class Call:
    """What is remembered of a call that had images."""

    images: Images
    selection: Selection
    clock: Clock
    keep: float | int | None
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

    Attributes:
        last: the last call, or None if it had no images.
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

    def clock(self, inputs: Mapping[str, Any]) -> Clock:
        """A clock that has just started."""
        device = self.adapter.model.device
        if device.type == "meta":  # weights are fetched when they are used
            given = inputs.get("input_ids", inputs.get("inputs_embeds"))
            device = getattr(given, "device", torch.device("cpu"))
        clock = Clock(device)
        clock.mark("start")
        return clock

    def images(self, inputs: Mapping[str, Any]) -> Images:
        """The images among a call's inputs; refuses what would change the encoder's features."""
        for name in self.adapter.feature_options:
            given, expected = inputs.get(name), getattr(self.adapter.model.config, name)
            if given is not None and given != expected:
                raise UnsupportedModeError(
                    f"{name}={given!r} was given in a call, expected {expected!r} as in "
                    "model.config: set it there before vtc.patch"
                )
        return find_images(self.adapter, inputs, self._placeholders(inputs))

    def _placeholders(self, inputs: Mapping[str, Any]) -> Tensor:
        """Where visual tokens go: `bool[B, S]`; in embeddings they are found as stock does."""
        ids, embeds = inputs.get("input_ids"), inputs.get("inputs_embeds")
        if isinstance(ids, Tensor) and ids.dim() == 2:
            return ids == self.adapter.image_token_id
        if ids is None and isinstance(embeds, Tensor) and embeds.dim() == 3:
            token = torch.tensor(self.adapter.image_token_id, device=embeds.device)
            return (embeds == self.embedded(token)).all(-1)
        got = tuple(ids.shape) if isinstance(ids, Tensor) else type(ids).__name__
        raise InputError(
            f"pixel_values came with input_ids of {got}, expected a tensor [B, S] of ids"
        )

    def check_text(self, inputs: Mapping[str, Any]) -> None:
        """Refuse placeholders in a fresh call without pixels: stock would read them as text."""
        ids = inputs.get("input_ids")
        if not isinstance(ids, Tensor) or inputs.get("inputs_embeds") is not None:
            return
        if count := int((ids == self.adapter.image_token_id).sum()):
            raise InputError(
                f"input_ids hold {count} image placeholders and no pixel_values came with them, "
                "expected both or neither: pass the processor's whole output"
            )

    def embedded(self, ids: Tensor) -> Tensor:
        """The text embeddings of ids."""
        return self.adapter.model.get_input_embeddings()(ids)  # type: ignore[no-any-return]

    def note(self, images: Images, selection: Selection | None, clock: Clock) -> None:
        """Remember a decision as the last call's; None: everything was kept, nothing decided."""
        if selection is None:
            selection = Selection.everything(images.lengths, images.parent, images.grids)
        self.last = Call(images, selection, clock, self.budget.keep)

    def keeps_all(self, images: Images) -> bool:
        """Whether the budget leaves every image whole, so that nothing has to run."""
        return self.budget.keeps_all(images.lengths)

    def decide(self, images: Images, features: Tensor, inputs: Mapping[str, Any]) -> Selection:
        """Run the method on padded groups of tokens `[G, N, D]`."""
        # the encoder of a model spread over devices may be elsewhere
        read = self.signals.read(features.shape[1])
        signals = {key: signal.to(features.device) for key, signal in read.items()}
        if any(s.name == "image_key" for s in self.method.needs):
            pixels = self.adapter.pixels(inputs)
            signals["image_key"] = torch.tensor([_key(p) for p in pixels])
        tokens = Tokens(
            features=features,
            valid=images.to(features.device).valid,
            grid=images.grids,
            parent=images.parent,
            signals=signals,
            seed=self.seed,
        )
        with torch.no_grad():
            selection = self.method.select(tokens, self.budget)
        if not isinstance(selection, Selection) or selection.lengths != images.lengths:
            got = getattr(selection, "lengths", type(selection).__name__)
            raise VtcError(
                f"method {self.method.name!r} decided over {got}, expected a Selection over "
                f"{images.lengths} tokens: return one for the groups given to select"
            )
        return selection

    def decide_before(self, images: Images, inputs: Mapping[str, Any]) -> Selection:
        """Run a method that acts on pixels: there are no tokens yet."""
        nothing = self.adapter.pixels(inputs)[0].new_zeros(*images.columns.shape, 0)
        return self.decide(images, nothing, inputs)

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
        window = getattr(self.adapter.language_model.config, "sliding_window", None)
        if window is not None and embeds.shape[1] > window:
            raise UnsupportedModeError(
                f"a prompt of {embeds.shape[1]} tokens meets a language model whose attention "
                f"slides over {window}, expected at most as many: its window counts the tokens "
                "that are left, so that dropping some would move it"
            )
        # with a model spread over devices, ids may be elsewhere than what the encoder made of them
        mask, ids = attention_mask.to(embeds.device), position_ids.to(embeds.device)
        compaction = plan(images, selection, mask, self.policy)
        appended = None
        if small is not None:
            appended = by_row(small, images.rows, len(embeds))
        elif selection.merge is not None:
            slots = selection.apply(gather_groups(images, embeds))  # [G, S, D]
            kept = selection.keep.shape[1]
            filled = selection.slot_positions[:, kept:].cpu() >= 0
            parts = [s[where] for s, where in zip(slots[:, kept:], filled, strict=True)]
            appended = by_row(parts, images.rows, len(embeds))
            embeds = _replace_kept(images, selection, embeds, slots)
        short_mask = compaction.mask(mask)
        short_ids = compaction.positions(ids, short_mask, self.policy)
        return Short(
            inputs_embeds=compaction.gather(embeds, appended),
            attention_mask=short_mask,
            position_ids=short_ids,
            shift=_last(ids, mask) - _last(short_ids, short_mask),
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
    placed = images.to(embeds.device)
    found = embeds[placed.rows[:, None], placed.columns]
    return found.masked_fill(~placed.valid[..., None], 0)


def _replace_kept(images: Images, selection: Selection, embeds: Tensor, slots: Tensor) -> Tensor:
    """Kept tokens into which others were merged, at their own columns."""
    if not selection.keep.shape[1]:
        return embeds
    placed = images.to(embeds.device)
    valid = selection.valid.to(embeds.device)
    keep = selection.keep.to(embeds.device)
    columns = placed.columns.gather(1, keep)[valid]
    rows = placed.rows[:, None].expand_as(keep)[valid]
    return embeds.index_put((rows, columns), slots[:, : keep.shape[1]][valid])


def _last(position_ids: Tensor, mask: Tensor) -> Tensor:
    """The highest position id attended to, `[(P,) B, 1]`."""
    return position_ids.masked_fill(mask == 0, -1).amax(-1, keepdim=True)


def _key(pixels: Tensor) -> int:
    """A number that depends on the picture alone, not on its place in a batch."""
    return zlib.crc32(pixels.detach().float().cpu().contiguous().numpy().tobytes())
