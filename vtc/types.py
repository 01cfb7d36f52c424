"""The data every method speaks: `Tokens` in, `Selection` out, `Budget` and `Signal` between.

Letters: G groups (what one decision is made over: an image, a crop, a frame), N tokens of a group
(padded), K kept, S slots (kept + appended), D features, B batch rows, M text tokens, P merge pairs.
"""

from __future__ import annotations

import json
import math
import numbers
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property, partial
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from vtc import ops
from vtc.errors import OptionError, SignalError

# names of signals that are computed elsewhere than in the encoder
LLM_HIDDEN = "llm_hidden"
TEXT = "text"
ENCODER_ROW = "encoder_row"
# the signals that are a vector for each token, `[G, N, D]`
VECTORS = (LLM_HIDDEN, "encoder_features", "keys", "mean_keys")
# of the [CLS] of each row of an image, `[G, rows, D]`: read by the runtime, not by methods
CLS_FEATURES = "cls_features"


def round_half_up(x: float) -> int:
    """The one rounding rule of the package: 0.5 goes up."""
    return math.floor(x + 0.5)


def scale_layer(layer: int, published_depth: int, depth: int) -> int:
    """A layer index published for another depth, on a model of `depth` layers (>= 1; 0 stays 0)."""
    return max(1, round_half_up(layer * depth / published_depth)) if layer > 0 else 0


@dataclass(frozen=True)
class Signal:
    """Something a method needs from the model; the runtime computes exactly that and nothing else.

    Args:
        name: what. Rows `[G, L, N]` of encoder blocks: `"cls_row"` (attention of [CLS] to the
            patches), `"cls_row_joint"` (the same with all heads as one) or `"received_row"`
            (attention that a patch receives, the mean over all queries). Vectors `[G, N, D]`:
            `"encoder_features"` (the output of one block, before the projector), `"keys"` of one
            block (heads side by side), `"mean_keys"` (the mean over heads) or `"llm_hidden"` (the
            input of one decoder layer, to which the language model is run once more). Besides:
            `"text"` (`Tokens.text`), `"encoder_row"` (`[G, N]`, the crop, tile or frame of its
            image that a token is from), `"image_key"` (a number made from the pixels of the
            group's image) or, for selections that send a [CLS], `"cls_features"`.
        blocks: encoder blocks, 0-based, as published for an encoder of `depth` blocks; they are
            scaled to the model at hand. Negative ones count from the end, like a Python slice,
            unscaled.
        depth: the depth `blocks` were published for; None: they are meant as they are.
        ends_at_tap: the window runs to the feature tap (the last block whose output the LLM reads);
            without `blocks` it is the tap alone.
        label: key under which a method finds it in `Tokens.signals`; by default the name.
        stand_in: name of the signal computed instead where the encoder has no [CLS], under the same
            key: `"mean_query_row"` and `"received_row"` (as in `vtc.ops`) or `"random_row"` (by
            seed and picture); None: the method is refused there.
    """

    name: str
    blocks: tuple[int, ...] = ()
    depth: int | None = None
    ends_at_tap: bool = False
    label: str | None = None
    stand_in: str | None = None

    def __init__(
        self,
        name: str,
        blocks: Iterable[int] = (),
        depth: int | None = None,
        ends_at_tap: bool = False,
        label: str | None = None,
        stand_in: str | None = None,
    ) -> None:
        values = (name, tuple(blocks), depth, ends_at_tap, label, stand_in)
        for attribute, value in zip(self.__dataclass_fields__, values, strict=True):
            object.__setattr__(self, attribute, value)

    @property
    def key(self) -> str:
        """The key of this signal in `Tokens.signals`."""
        return self.label or self.name

    def resolve(self, depth: int, tap: int) -> tuple[int, ...]:
        """The blocks of an encoder with `depth` blocks whose features are read after block `tap`.

        Raises:
            SignalError: the window is empty or leaves the encoder on this depth.
        """

        def place(block: int) -> int:
            if block < 0:
                return depth + block
            return block if self.depth in (None, depth) else scale_layer(block, self.depth, depth)

        found = {place(b) for b in self.blocks}
        if self.ends_at_tap:
            found = set(range(min(found, default=tap), tap + 1))
        if self.blocks and (not found or min(found) < 0 or max(found) >= depth):
            published = f" (published for {self.depth})" if self.depth else ""
            # the advice is in the numbers that the user writes, which are scaled
            last = max(b for b in range(max(self.depth or 0, depth)) if place(b) <= tap)
            negative = f", or of {-depth} to {tap - depth}" if self.blocks[0] < 0 else ""
            raise SignalError(
                f"{self.name} of blocks {_span(self.blocks)}{published} leaves no block on this "
                f"encoder: it has {depth} blocks and its features are read after block {tap}; "
                f"choose a start of at most {last}{negative}"
            )
        return tuple(sorted(found))


def _span(blocks: tuple[int, ...]) -> str:
    return f"{blocks[0]}..{blocks[-1]}" if len(blocks) > 1 else str(blocks[0])


@dataclass(frozen=True, eq=False)
class Tokens:
    """What one decision may look at: padded groups of visual tokens and the signals asked for.

    Attributes:
        features: `[G, N, D]` tokens in the LLM's embedding space (D = 0 at the pixel site).
        valid: `bool[G, N]`, False on padding.
        grid: `(t, h, w)` of the tokens of each group, in LLM tokens; a group of several parts (an
            image of crops or tiles) counts as one row of all its tokens.
        parent: `int64[G, 2]`: the image (counted over the call) and the batch row of each group.
        text: `[B, M, D]` embeddings of the text after the last image of each row, or None.
        text_valid: `bool[B, M]`, or None.
        text_ids: `int64[B, M]`, its ids, where the prompt came as ids; or None.
        signals: what the method asked for, by `Signal.key`; `cls_row` is `[G, L, N]`, float32.
        seed: the seed given to `vtc.patch`, for methods that draw.
        parts: the grids of the parts of each group, in order; None: each is its one grid.
        overview: the tokens (first, end) of each group that show the whole picture, such as the
            thumbnail beside its crops; all of them where there is no such part. None: as that.
        index: `int64[G, N]`, behind an earlier cut: which of its group's tokens each was before;
            0 on padding. None: they are all there, in order.
        counted: valid tokens of each group, where the host knows them without asking the device.
    """

    features: Tensor
    valid: Tensor
    grid: tuple[tuple[int, int, int], ...]
    parent: Tensor
    text: Tensor | None = None
    text_valid: Tensor | None = None
    text_ids: Tensor | None = None
    signals: Mapping[str, Tensor] = field(default_factory=dict)
    seed: int = 0
    overview: tuple[tuple[int, int], ...] | None = None
    parts: tuple[tuple[tuple[int, int, int], ...], ...] | None = None
    index: Tensor | None = None
    counted: tuple[int, ...] | None = None

    def signal(self, key: str) -> Tensor:
        """The signal called `key`; raises `SignalError` saying which exist."""
        if key not in self.signals:
            raise SignalError(
                f"signal {key!r} was not captured; there is {sorted(self.signals) or 'none'}; "
                f"name it in the scorer's `needs`"
            )
        return self.signals[key]

    @cached_property
    def lengths(self) -> tuple[int, ...]:
        """Number of valid tokens of each group."""
        if self.counted is not None:
            return self.counted
        # read once: on a GPU each reading waits for the encoder
        return tuple(self.valid.sum(-1).tolist())


@dataclass(frozen=True)
class Budget:
    """How much is kept: a fraction in (0, 1] or tokens per image; None: the method decides."""

    keep: float | int | None

    @classmethod
    def of(cls, keep: float | int | Budget | None) -> Budget:
        """Check `keep` and wrap it.

        Raises:
            OptionError: not None, a float in (0, 1] or an int >= 1.
        """
        if isinstance(keep, Budget):
            return keep
        fix = "pass a float in (0, 1] for a fraction or an int >= 1 for tokens per image"
        if keep is None:
            return cls(None)
        if isinstance(keep, bool) or not isinstance(keep, numbers.Real):
            raise OptionError(f"keep={keep!r} is a {type(keep).__name__}, expected a number: {fix}")
        if isinstance(keep, numbers.Integral):
            if keep < 1:
                raise OptionError(f"keep={keep} tokens is out of range, expected at least 1: {fix}")
            return cls(int(keep))
        if not 0.0 < float(keep) <= 1.0:
            raise OptionError(f"keep={float(keep)} is out of range, expected (0, 1]: {fix}")
        return cls(float(keep))

    def count(self, n: int) -> int:
        """Tokens kept of an image that has `n`: floor(keep·n + 0.5), at least 1, at most n."""
        if self.keep is None:
            raise OptionError(
                "keep=None has no count: this method needs a fraction or a number of tokens"
            )
        wanted = self.keep if isinstance(self.keep, int) else round_half_up(self.keep * n)
        return max(min(1, n), min(wanted, n))

    def counts(self, valid: Tensor | Sequence[int], parent: Tensor | None = None) -> Tensor:
        """Tokens kept of each group.

        The budget is per image; an image of several groups shares it by largest remainder, in
        proportion to their sizes (ties: the lower group).

        Args:
            valid: `bool[G, N]`, or the tokens of each group.
            parent: `int64[G, 2]` or `int64[G]`, the image of each group first; None: one group,
                one image.

        Returns:
            `int64[G]` on the CPU.
        """
        sizes = valid.sum(-1).tolist() if isinstance(valid, Tensor) else list(valid)
        images = list(range(len(sizes)))
        if parent is not None:
            images = (parent[:, 0] if parent.dim() == 2 else parent).tolist()
        counts = [0] * len(sizes)
        for image in dict.fromkeys(images):
            members = [g for g, i in enumerate(images) if i == image]
            shares = largest_remainder([sizes[g] for g in members], partial(self.of_image, image))
            for g, share in zip(members, shares, strict=True):
                counts[g] = share
        return torch.tensor(counts, dtype=torch.int64)

    def of_image(self, image: int, n: int) -> int:
        """Tokens kept of an image, counted over the call, that has `n`."""
        return self.count(n)

    def keeps_all(self, n: Iterable[int]) -> bool:
        """Whether nothing would be dropped from images of `n` tokens each."""
        return self.keep is not None and all(self.count(i) == i for i in n)


def largest_remainder(sizes: list[int], count: Callable[[int], int]) -> list[int]:
    """`count(sum of sizes)` shared in proportion to sizes; ties go to the first."""
    total = sum(sizes)
    wanted = count(total)
    # in whole numbers, so that equal remainders are equal
    parts = [divmod(wanted * n, max(total, 1)) for n in sizes]
    shares = [whole for whole, _ in parts]
    by_remainder = sorted(range(len(sizes)), key=lambda g: (-parts[g][1], g))
    for g in by_remainder[: wanted - sum(shares)]:
        shares[g] += 1
    return shares


@dataclass(frozen=True, eq=False)
class Selection:
    """A decision as data: the same object prunes features and positions, and draws the overlay.

    Slots are what reaches the LLM: the K kept tokens of a group, in original order, then appended
    ones (merged or pooled). Indices always refer to the original LLM tokens of the group.

    Attributes:
        keep: `int64[G, K]`, ascending, 0 where not `valid`; −1 for a [CLS] sent to the LLM, which
            stands before all tokens of its image.
        valid: `bool[G, K]`.
        lengths: number of original tokens of each group.
        parent: `int64[G, 2]`: image and batch row of each group.
        grid: `(t, h, w)` of the original tokens of each group, as in `Tokens`.
        scores: `float32[G, N]`, higher = keep, or None.
        positions: `int64[G, S]`: the original token whose position id a slot takes; −1: empty slot.
            None: slots are the kept tokens, each at its own position.
        merge: None, or the sparse triple `(slot, token, weight)`, each `[G, P]`: slots named there
            are weighted sums of tokens instead of copies; weight 0 is padding.
        parts: the grids of the parts of each group, as in `Tokens`; None: each is its one grid.
        merged: what `merge` sums: tokens as the LLM gets them, or the encoder's features, projected
            afterwards where the model projects one by one (the LLaVA lineage); elsewhere tokens.
        sends_cls: whether the first slot of every group is the [CLS] of its image.
    """

    keep: Tensor
    valid: Tensor
    lengths: tuple[int, ...]
    parent: Tensor
    grid: tuple[tuple[int, int, int], ...]
    scores: Tensor | None = None
    positions: Tensor | None = None
    merge: tuple[Tensor, Tensor, Tensor] | None = None
    parts: tuple[tuple[tuple[int, int, int], ...], ...] | None = None
    merged: Literal["llm", "encoder"] = "llm"
    sends_cls: bool = False

    @classmethod
    def everything(
        cls,
        lengths: Iterable[int],
        parent: Tensor,
        grid: Iterable[tuple[int, int, int]],
        parts: tuple[tuple[tuple[int, int, int], ...], ...] | None = None,
    ) -> Selection:
        """The selection that keeps every token."""
        lengths = tuple(lengths)
        keep = torch.arange(max(lengths, default=0)).repeat(len(lengths), 1)
        valid = keep < torch.tensor(lengths, dtype=torch.int64)[:, None]
        return cls(keep * valid, valid, lengths, parent.cpu(), tuple(grid), parts=parts)

    @classmethod
    def of_mask(
        cls,
        mask: Tensor,
        lengths: Iterable[int],
        parent: Tensor,
        grid: Iterable[tuple[int, int, int]],
        parts: tuple[tuple[tuple[int, int, int], ...], ...] | None = None,
        scores: Tensor | None = None,
        width: int | None = None,
    ) -> Selection:
        """The selection that keeps the tokens at `bool[G, N]`; `width` is the most of any group,
        where the host knows it without asking the device."""
        counts = mask.sum(-1)
        if width is None:
            width = int(counts.max()) if len(mask) else 0
        keep = torch.where(mask, torch.arange(mask.shape[1], device=mask.device), mask.shape[1])
        valid = torch.arange(width, device=mask.device) < counts[:, None]
        keep = keep.sort(-1).values[:, :width].masked_fill(~valid, 0)
        return cls(
            keep, valid, tuple(lengths), parent.cpu(), tuple(grid), scores=scores, parts=parts
        )

    @cached_property
    def slot_positions(self) -> Tensor:
        """`positions`, never None: `int64[G, S]`, −1 where a slot is empty."""
        if self.positions is not None:
            return self.positions
        return self.keep.clamp_min(0).masked_fill(~self.valid, -1)

    @property
    def width(self) -> int:
        """S, empty slots counted."""
        return (self.keep if self.positions is None else self.positions).shape[1]

    @property
    def slots(self) -> Tensor:
        """`int64[G]`: how many tokens of each group reach the LLM."""
        return (self.slot_positions >= 0).sum(-1)

    @property
    def is_identity(self) -> bool:
        """Whether every token is kept and nothing is merged or appended."""
        # told by shapes where they can tell: on a GPU reading numbers waits for the encoder
        if self.width < max(self.lengths, default=0):
            return False
        return (
            self.merge is None
            and self.slots.tolist() == list(self.lengths) == self.valid.sum(-1).tolist()
        )

    def mask(self) -> Tensor:
        """`bool[G, N]`: True where a token is kept (merged-away tokens are False)."""
        return self._scatter(self.keep, self.valid & (self.keep >= 0))

    def covered(self) -> Tensor:
        """`bool[G, N]`: True where a token is kept or is a member of a merged one."""
        if self.merge is None:
            return self.mask()
        _, token, weight = self.merge
        return self.mask() | self._scatter(token, weight != 0)

    def _scatter(self, index: Tensor, where: Tensor) -> Tensor:
        mask = torch.zeros(
            len(self.lengths), max(self.lengths, default=0), dtype=torch.bool, device=index.device
        )
        group = torch.arange(len(mask), device=index.device)[:, None].expand_as(index)
        mask[group[where], index[where]] = True
        return mask

    def apply(self, x: Tensor) -> Tensor:
        """What reaches the LLM of `x [G, N, ...]`: `[G, S, ...]`, zeros in empty slots; where a
        [CLS] stands, the token whose position it takes."""
        slots = self.slot_positions.to(x.device)
        group = torch.arange(len(slots), device=x.device)[:, None]
        over = [1] * (x.dim() - 2)  # an index [G, S] seen over the trailing dimensions of x
        out = x[group, slots.clamp_min(0)]
        if self.merge is not None:
            slot, token, weight = (part.to(x.device) for part in self.merge)
            sums = ops.group_merge(x, slot, token, weight, slots.shape[1])
            members = torch.zeros(slots.shape, dtype=torch.bool, device=x.device)
            members = members.index_put((group.expand_as(slot), slot), weight != 0, accumulate=True)
            out = torch.where(members.view(*members.shape, *over), sums, out)
        return out.masked_fill((slots < 0).view(*slots.shape, *over), 0)

    def save(self, path: str | Path) -> None:
        """Write to a safetensors file; `load` reads it back."""
        from safetensors.torch import save_file

        named = {
            "keep": self.keep,
            "valid": self.valid,
            "parent": self.parent,
            "positions": self.slot_positions,
        }
        if self.scores is not None:
            named["scores"] = self.scores
        if self.merge is not None:
            named |= dict(zip(("slot", "token", "weight"), self.merge, strict=True))
        tensors = {name: part.cpu().contiguous() for name, part in named.items()}
        told = ("lengths", "grid", "parts", "sends_cls")
        meta = {name: json.dumps(getattr(self, name)) for name in told} | {"merged": self.merged}
        save_file(tensors, str(path), metadata=meta)

    @classmethod
    def load(cls, path: str | Path) -> Selection:
        """Read what `save` wrote."""
        from safetensors import safe_open

        with safe_open(str(path), framework="pt") as file:
            meta, part = file.metadata(), {n: file.get_tensor(n) for n in file.keys()}  # noqa: SIM118
        return cls(
            keep=part["keep"],
            valid=part["valid"],
            lengths=tuple(json.loads(meta["lengths"])),
            parent=part["parent"],
            grid=tuple((t, h, w) for t, h, w in json.loads(meta["grid"])),
            scores=part.get("scores"),
            positions=part["positions"],
            merge=(part["slot"], part["token"], part["weight"]) if "slot" in part else None,
            parts=_as_parts(json.loads(meta.get("parts", "null"))),
            merged=meta.get("merged", "llm"),
            sends_cls=json.loads(meta.get("sends_cls", "false")),
        )


def _as_parts(
    read: list[list[list[int]]] | None,
) -> tuple[tuple[tuple[int, int, int], ...], ...] | None:
    if read is None:
        return None
    return tuple(tuple((t, h, w) for t, h, w in grids) for grids in read)
