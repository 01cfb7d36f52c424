"""What a method may look at inside the encoder and inside the LLM: queries, keys, values, places.

Letters: R rows of the encoder (a crop, a tile, a frame; in encoders that pack, an image or a
video), U units of a row (padded), m patches per unit, H heads, d head dimension, G groups (images,
then videos), N tokens of a group (padded), B batch rows, S entries of the sequence, T keys.

A unit is what becomes one LLM token: its m patches live or die together.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from vtc.entrance import Entrance, Heads
from vtc.errors import VtcError
from vtc.types import Tokens


@dataclass(frozen=True)
class Facts:
    """What a method may know about a model when it is patched. No names of families.

    Attributes:
        encoder_depth: blocks of the vision encoder.
        tap: the block whose output the LLM reads, 0-based.
        has_cls: whether token 0 of the encoder is a [CLS].
        projects: whether the projector takes features one by one, whatever they are.
        patches_per_token: m, patches that become one LLM token.
        tiled: whether an image may be encoded as several crops or tiles.
        llm_depth: decoder layers.
        first_layer_cut: the first decoder layer after which visual tokens can be dropped; later
            than 0 where encoder features are added behind the first layers.
        llm_heads: query heads of a decoder layer.
        llm_width: hidden size of the LLM.
        llm_kind: the LLM's `model_type`, such as `"llama"`.
        name: the folder or hub id that the model was loaded from; empty if from none.
        llm_kv_heads: key/value heads of a decoder layer.
    """

    encoder_depth: int
    tap: int
    has_cls: bool
    patches_per_token: int
    tiled: bool
    llm_depth: int
    first_layer_cut: int = 0
    llm_heads: int = 0
    llm_width: int = 0
    llm_kind: str = ""
    name: str = ""
    llm_kv_heads: int = 0
    projects: bool = False


@dataclass(frozen=True, eq=False)
class BlockView:
    """What is left of every row of the encoder, as one block's attention saw it.

    Attributes:
        block: the block, 0-based. A cut decided here is in force from the next block on; −1 is in
            front of the first block, where there are no queries, keys or values.
        tap: the block whose output the LLM reads; the last useful decision is that of `tap - 1`.
        valid: `bool[R, U]`, False on padding.
        index: `int64[R, U]`, which unit of the row (in LLM token order), ascending; 0 on padding.
        units: `int64[R]` on the CPU, how many of the row's reach the LLM where nothing is cut.
        image: `int64[R]` on the CPU, the image (or video) that the row belongs to.
        tokens: N of each image: its tokens in the stock LLM, over all its rows.
        rows: how many rows each image has.
        has_cls: whether entry 0 of query, key and value is the [CLS].
        query: `[R, H, c + U·m, d]` with rotary positions applied, c = 1 with a [CLS], else 0; the
            patches of a unit stand together. Padding holds zeros.
        key: likewise.
        value: likewise.
        scale: what q·k is multiplied by.
        carry: what the method handed on from the block before, each `[R, U]`, cut alike.
        video: whether each image is a video.
        image_key: `int64[R]` on the CPU, a number made from the pixels of the row's image, another
            one for each of its rows; None where the method's `needs` do not name it.
        seed: the seed given to `vtc.patch`.
        pixels: in front of the first block, the pixel values of each unit, `[R, U, v]`; else None.
        cells: in front of the first block, the frame, row and column of each unit in the grid of
            its row, `int64[R, U, 3]` on the CPU; −1 on padding; else None.
    """

    block: int
    tap: int
    valid: Tensor
    index: Tensor
    units: Tensor
    image: Tensor
    tokens: tuple[int, ...]
    rows: tuple[int, ...]
    has_cls: bool
    query: Tensor
    key: Tensor
    value: Tensor
    scale: float
    carry: Mapping[str, Tensor]
    video: tuple[bool, ...] = ()
    image_key: Tensor | None = None
    seed: int = 0
    pixels: Tensor | None = None
    cells: Tensor | None = None

    @property
    def patches(self) -> int:
        """m, patches per unit."""
        return (self.key.shape[2] - int(self.has_cls)) // max(self.valid.shape[1], 1)


@dataclass(frozen=True, eq=False)
class Cut:
    """What a method says after a block.

    Attributes:
        keep: `bool[R, U]`, the units that go on, or None: no cut here. At least one of each row
            that has any.
        carry: numbers `[R, U]` to be handed to the next block, by name.
        into: `int64[R, U]`, the unit of its row whose hidden states each takes part in, patch by
            patch; kept ones take part in their own. None: nothing is merged.
        weight: `float[R, U]`, with which weight.
        size: `float[R, U]`, how many units each that goes on counts for in the attention of later
            blocks: log(size) is added to the logits on its patches; None: one.
    """

    keep: Tensor | None
    carry: Mapping[str, Tensor]
    into: Tensor | None = None
    weight: Tensor | None = None
    size: Tensor | None = None


@dataclass(frozen=True, eq=False)
class LayerView:
    """The sequence as one decoder layer's attention saw it, in the prefill of a call with images.

    Attributes:
        layer: the layer, 0-based. What is dropped here is gone from the next layer on.
        valid: `bool[G, N]`, False on padding: the tokens that are still there.
        index: `int64[G, N]`, which original LLM token of its image each is; 0 on padding.
        columns: `int64[G, N]`, where each stands among the S entries; 0 on padding.
        parent: `int64[G, 2]`: image and batch row of each group, on the device of `columns`.
        tokens: N of each image in the stock LLM.
        mask: `bool[B, S]`, False on the padding of the sequence.
        visual: `bool[B, S]`, True on visual tokens (newline tokens are text).
        query: `[B, H, S, d]`, rotary positions applied; NaN in rows that issue no query there
            because another method has them skip attention.
        key: `[B, H, T, d]`, rotary positions applied, T ≥ S: the last S are those of the entries,
            what is before them was in the cache; grouped heads are repeated.
        value: `[B, H, T, d]`.
        scale: what q·k is multiplied by.
        hidden: `[B, S, D]`, the residual stream behind the layer: the input of the next.
        newlines: `int64[M, 5]`, for each newline token its batch row and column, its group, and the
            range `first ≤ index < end` of tokens whose row it ends; a column S: it is gone. None:
            there are none.
        image_key: `int64[G]` on the CPU, a number made from the pixels of each image; None where
            the method's `needs` do not name it.
        seed: the seed given to `vtc.patch`.
        held: `bool[B, T − S]`, what of the cache may be attended to; None: all of it.
        facts: of the model; None: not known.
        entrance: gives what the first layer got; None: not known.
        final_norm: the language model's last norm, `[..., D]` to `[..., D]`; None: not known.
        ahead: see `next_layer`; None: not known.
        lengths: how many tokens of each group are still there, where the host knows without asking
            the device; None: see `left`.
        rows: the batch row of each group, likewise.
    """

    layer: int
    valid: Tensor
    index: Tensor
    columns: Tensor
    parent: Tensor
    tokens: tuple[int, ...]
    mask: Tensor
    visual: Tensor
    query: Tensor
    key: Tensor
    value: Tensor
    scale: float
    hidden: Tensor | None = None
    newlines: Tensor | None = None
    image_key: Tensor | None = None
    seed: int = 0
    held: Tensor | None = None
    facts: Facts | None = None
    entrance: Callable[[], Entrance] | None = None
    final_norm: Callable[[Tensor], Tensor] | None = None
    ahead: Callable[[bool], Heads] | None = None
    lengths: tuple[int, ...] | None = None
    rows: tuple[int, ...] | None = None

    @property
    def left(self) -> Tensor:
        """`int64[G]` on the CPU: tokens of each group that are still there."""
        if self.lengths is None:
            return self.valid.sum(-1).cpu()
        return torch.tensor(self.lengths, dtype=torch.long)

    @property
    def reachable(self) -> Tensor:
        """`bool[B, T]`: the keys that the last entry of each row may attend to."""
        past = self.key.shape[2] - self.mask.shape[1]
        held = self.mask.new_ones(len(self.mask), past) if self.held is None else self.held
        return torch.cat([held.to(self.mask.device), self.mask], 1)

    def as_tokens(self, features: Tensor, signals: Mapping[str, Tensor]) -> Tokens:
        """The visual tokens of every group, for scorers and selectors.

        Args:
            features: `[G, N, D]`.
            signals: by key; a number made from the pixels joins them where it is known.
        """
        known = {} if self.image_key is None else {"image_key": self.image_key}
        parent = self.parent if self.rows is None else torch.tensor([*enumerate(self.rows)])
        return Tokens(
            features=features,
            valid=self.valid,
            grid=((1, 1, self.valid.shape[1]),) * len(self.valid),
            parent=parent,
            signals={**known, **signals},
            seed=self.seed,
            index=self.index,
            counted=self.lengths,
        )

    def next_layer(self, rotary: bool = True) -> LayerView:
        """The same entries as the next layer's attention would see them if none were dropped: its
        queries, keys and values are projected from `hidden`. Costs about as much as its attention.

        Args:
            rotary: whether rotary positions are applied to them.
        """
        if self.ahead is None:
            raise VtcError(
                f"the view of decoder layer {self.layer} does not know the next layer, expected "
                "one made by vtc.patch"
            )
        heads = self.ahead(rotary)
        named = {field: getattr(heads, field) for field in Heads.__dataclass_fields__}
        return replace(self, **named)

    def narrowed(self, keep: Tensor) -> LayerView:
        """What is left when only the tokens at `bool[G, N]` stay, and newlines of rows of theirs.

        The others are padding then: they keep their place among the entries.
        """
        left, gone = self.valid & keep, self.valid & ~keep
        group, token = gone.nonzero(as_tuple=True)
        # newlines that are gone already stand behind all entries
        there = F.pad(torch.ones_like(self.mask), (0, 1))
        there[self.parent[group, 1], self.columns[group, token]] = False
        newlines = self.newlines
        if newlines is not None:
            row, column, of, first, end = newlines.unbind(-1)
            index, members = self.index[of], left[of]
            lives = members & (index >= first[:, None]) & (index < end[:, None])
            dead = ~lives.any(-1)
            there[row[dead], column[dead]] = False
            newlines = newlines[~dead]
        there = there[:, :-1]
        return replace(
            self,
            valid=left,
            lengths=None,
            index=self.index.masked_fill(~left, 0),
            columns=self.columns.masked_fill(~left, 0),
            mask=self.mask & there,
            visual=self.visual & there,
            newlines=newlines,
        )


@dataclass(frozen=True, eq=False)
class LayerCut:
    """What a method says behind a decoder layer that merges tokens besides dropping them.

    Attributes:
        keep: `bool[G, N]`, the tokens that go on.
        into: `int64[G, N]`, the token among the N whose hidden states each takes part in; kept ones
            take part in their own.
        weight: `float[G, N]`, with which weight; 0 where a token is dropped without a trace.
        size: `float[G, N]`, how many tokens each that goes on counts for in the attention of later
            layers: log(size) is added to the logits on it; None: one.
    """

    keep: Tensor
    into: Tensor
    weight: Tensor
    size: Tensor | None = None

    @classmethod
    def alone(cls, keep: Tensor) -> LayerCut:
        """Nothing is merged: kept tokens stay as they are."""
        place = torch.arange(keep.shape[1], device=keep.device)
        return cls(keep, place.expand_as(keep), keep.float())

    @property
    def merges(self) -> bool:
        """Whether any token is more than itself."""
        place = torch.arange(self.keep.shape[1], device=self.keep.device)
        changed = (self.into != place) & (self.weight != 0)
        return bool((changed | (self.keep & (self.weight != 1))).any())


def checked_cut(name: str, view: LayerView, keep: Any) -> Tensor | LayerCut:
    """What method `name` decided over `view`; raises `VtcError` where it is neither `bool[G, N]`
    nor a `LayerCut` over as many."""
    wanted = tuple(view.valid.shape)
    parts = [keep.keep, keep.into, keep.weight] if isinstance(keep, LayerCut) else [keep]
    if all(isinstance(x, Tensor) and x.shape == wanted for x in parts) and (
        parts[0].dtype == torch.bool
    ):
        if isinstance(keep, LayerCut) and bool(
            ((keep.weight != 0) & view.valid & ~keep.keep.gather(1, keep.into)).any()
        ):
            raise VtcError(
                f"method {name!r} merged tokens into one that is dropped after decoder layer "
                f"{view.layer}, expected one that is kept: say so in LayerCut.into"
            )
        return keep  # type: ignore[no-any-return]
    keep = parts[0]
    got = f"{keep.dtype} of {tuple(keep.shape)}" if isinstance(keep, Tensor) else type(keep)
    raise VtcError(
        f"method {name!r} decided {got} after decoder layer {view.layer}, expected a tensor of "
        f"bool of {wanted}: return one for the groups given to layer_cut"
    )


@dataclass(frozen=True, eq=False)
class RowView:
    """What a decoder layer is about to see, in the prefill of a call with images.

    Attributes:
        layer: the layer, 0-based.
        hidden: `[B, S, D]`, its input: the residual stream before the layer's norm.
        mask: `bool[B, S]`, False on padding.
        visual: `bool[B, S]`, True on visual tokens (newline tokens are text).
        valid: `bool[G, N]`, False on padding: the visual tokens that are there.
        columns: `int64[G, N]`, where each stands among the S entries; 0 on padding.
        parent: `int64[G, 2]`: image and batch row of each group.
        image_key: `int64[G]` on the CPU, a number made from the pixels of each image; None where
            the method's `needs` do not name it.
        seed: the seed given to `vtc.patch`.
    """

    layer: int
    hidden: Tensor
    mask: Tensor
    visual: Tensor
    valid: Tensor
    columns: Tensor
    parent: Tensor
    image_key: Tensor | None = None
    seed: int = 0
