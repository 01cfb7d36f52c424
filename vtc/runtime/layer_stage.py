"""What is left of a sequence between decoder layers: which entries, where the visual tokens are.

Letters: Q entries that the prefill began with (S of the prompt, then candidates of assisted
decoding), L entries left of them, B rows of the prompt; a run of k·B rows repeats each k times.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.nn import functional as F

from vtc import ops
from vtc.sites import LayerCut

_Data = TypeVar("_Data", "Placed", "Stage", "Blend")


@dataclass(frozen=True, eq=False)
class Placed:
    """The sequence that the language model is about to see, before any cut between its layers.

    Attributes:
        columns: `int64[G, N]`, where each visual token that reached the language model stands among
            the S entries; 0 on padding.
        valid: `bool[G, N]`, False on padding.
        index: `int64[G, N]`, the original token of its image that each is.
        parent: `int64[G, 2]`, image and batch row.
        tokens: N of each image in the stock model.
        visual: `bool[B, S]`, True on visual tokens.
        newlines: `int64[M, 5]`, for each newline token its batch row and column, its group, and the
            range `first ≤ index < end` of original tokens whose row it ends; column S: it is gone.
        lengths: tokens of each image that reached the language model, where the host knows; None:
            only the device does.
        rows: the batch row of each image.
        longest: no less than the entries of any row but its padding, where the host knows.
    """

    columns: Tensor
    valid: Tensor
    index: Tensor
    parent: Tensor
    tokens: tuple[int, ...]
    visual: Tensor
    newlines: Tensor
    lengths: tuple[int, ...] | None = None
    rows: tuple[int, ...] = ()
    longest: int | None = None


@dataclass(frozen=True, eq=False)
class LayerDecision:
    """What one cut between layers left.

    Attributes:
        layer: the layer whose attention was looked at; the cut is in force from the next one on.
        keep: `bool[G, N]` over the tokens of `Placed`: what this cut and those before it left.
        entries: length of the sequence behind the cut, padding included.
        merged: `int64[3, M]` and `float[M]`, where tokens were merged: group, token of `Placed`
            that goes on and token that is part of it, and with which weight; or None.
    """

    layer: int
    keep: Tensor
    entries: int
    merged: tuple[Tensor, Tensor] | None = None


@dataclass(frozen=True, eq=False)
class Blend:
    """Hidden states that become weighted sums of others on their way into a stage.

    Letters: M parts of all sums.

    Attributes:
        row: `int64[M]`, batch row.
        into: `int64[M]`, the entry of the stage before that becomes a sum.
        part: `int64[M]`, an entry of the stage before that is part of it.
        weight: `float[M]`.
    """

    row: Tensor
    into: Tensor
    part: Tensor
    weight: Tensor

    def apply(self, hidden: Tensor, copies: int) -> Tensor:
        """`[k·B, L, D]` to the same; summed in float32."""
        move = partial(torch.Tensor.to, device=hidden.device)
        row, into, part, weight = map(move, (self.row, self.into, self.part, self.weight))
        out = hidden.clone()
        for copy in range(copies):
            own = row * copies + copy
            place, which = torch.stack([own, into]).unique(dim=1, return_inverse=True)
            sums = torch.zeros(place.shape[1], hidden.shape[-1], device=hidden.device)
            sums.index_add_(0, which, hidden[own, part].float() * weight[:, None])
            out[place[0], place[1]] = sums.to(hidden.dtype)
        return out


@dataclass(frozen=True, eq=False)
class Stage:
    """The entries that a group of decoder layers sees in a prefill.

    Attributes:
        source: `int64[B, L]`, where each entry stood in the stage before.
        real: `bool[B, L]`, False on the padding that cutting made.
        columns: `int64[B, L]`, which of the Q each entry is.
        mask: `bool[B, L]`, what may be attended to.
        visual: `bool[B, L]`.
        places: `int64[G, N]`, where the tokens that are left stand among the L; 0 on padding.
        valid: `bool[G, N]`.
        slot: `int64[G, N]`, which token of `Placed` each is.
        newlines: as in `Placed`, those that are left, with their columns among the L.
        placed: what the prefill began with.
        length: Q.
        extra: Q - S.
        blend: what entries of the stage before become on their way; None: they stay as they are.
        bias: `float[B, L]`, what is added to the attention logits on each entry; None: nothing.
    """

    source: Tensor
    real: Tensor
    columns: Tensor
    mask: Tensor
    visual: Tensor
    places: Tensor
    valid: Tensor
    slot: Tensor
    newlines: Tensor
    placed: Placed
    length: int
    extra: int
    blend: Blend | None = None
    bias: Tensor | None = None

    @classmethod
    def first(cls, placed: Placed, mask: Tensor, length: int) -> Stage:
        """Everything, on the device of the mask `[B, S]`; what is behind S is text."""
        device, extra = mask.device, length - mask.shape[1]
        moved = _to(placed, device)
        here = torch.arange(length, device=device).expand(len(mask), -1)
        return cls(
            source=here,
            real=torch.ones_like(here, dtype=torch.bool),
            columns=here,
            mask=F.pad(mask != 0, (0, extra), value=True),
            visual=F.pad(moved.visual, (0, extra)),
            places=moved.columns,
            valid=moved.valid,
            slot=torch.arange(moved.valid.shape[1], device=device).expand_as(moved.valid),
            newlines=moved.newlines,
            placed=moved,
            length=length,
            extra=extra,
        )

    def to(self, device: torch.device) -> Stage:
        """The same on a device."""
        return self if self.mask.device == device else _to(self, device)

    @property
    def entries(self) -> int:
        """L."""
        return self.columns.shape[1]

    @property
    def index(self) -> Tensor:
        """`int64[G, N]`: which original token of its image each token is; 0 on padding."""
        if self.valid is self.placed.valid:
            return self.placed.index
        return self.placed.index.gather(1, self.slot).masked_fill(~self.valid, 0)

    @property
    def keep(self) -> Tensor:
        """`bool[G, N]` over the tokens of `Placed`: those that are left."""
        if self.columns is self.source:  # nothing has left the sequence
            return self.valid
        wide = F.pad(torch.zeros_like(self.placed.valid), (0, 1))
        slot = self.slot.masked_fill(~self.valid, wide.shape[1] - 1)
        return wide.scatter(1, slot, True)[:, :-1]

    @property
    def begun(self) -> Tensor:
        """`bool[B, L]`: False on the padding at the left of each row."""
        return (self.mask | self.visual).cumsum(-1) > 0

    @property
    def present(self) -> Tensor:
        """`bool[B, Q]`: the entries that are left."""
        columns = self.columns.masked_fill(~self.real, self.length)
        found = self.real.new_zeros(len(columns), self.length + 1)
        return found.scatter(1, columns, True)[:, :-1]

    def cut(self, cut: Tensor | LayerCut) -> Stage:
        """The stage behind a cut that keeps `bool[G, N]`; this very one if it drops nothing.

        Rows are padded anew on the left, to the longest.
        """
        keep = cut.keep if isinstance(cut, LayerCut) else cut
        gone, left = self.valid & ~keep, self.valid & keep
        if not bool(gone.any()):
            return self
        stays, lives = self._staying(gone, left)
        size = max(int(stays.sum(-1).max()), 1), max(int(left.sum(-1).max()), 1)
        stage = self._shortened(stays, left, self.newlines[lives], *size, False)
        if not isinstance(cut, LayerCut):
            return stage
        blend = self._blend(cut) if cut.merges else None
        return dataclasses.replace(
            stage, blend=blend, bias=self._bias(cut, left, stage.source, stage.real)
        )

    def cut_to(self, keep: Tensor, entries: int, lengths: tuple[int, ...]) -> Stage:
        """The stage behind a cut that keeps `bool[G, N]`, without asking the device.

        Args:
            keep: nothing is merged or weighed.
            entries: length of its rows, no less than of any.
            lengths: how many it keeps of each group.
        """
        left = self.valid & keep
        stays, lives = self._staying(self.valid & ~keep, left)
        column = self.newlines[:, 1].masked_fill(~lives, self.entries)
        newlines = torch.cat([self.newlines[:, :1], column[:, None], self.newlines[:, 2:]], 1)
        even, width = len(set(lengths)) == 1, max(lengths)
        return self._shortened(stays, left, newlines, entries, width, even)

    def hidden(self, keep: Tensor) -> Stage:
        """The stage behind a cut whose entries all stay, but for what is not at `bool[G, N]` is
        attended to by none. It is the last."""
        left, rows = self.valid & keep, self.placed.parent[:, 1:]
        # the scratch column L takes what stays, and padding, whose token is none
        mask, scratch = F.pad(self.mask, (0, 1)), self.entries
        places = self.places.masked_fill(keep | ~self.valid, scratch)
        mask.index_put_((rows, places), mask.new_zeros(()))
        if len(self.newlines):
            columns = self.newlines[:, 1].masked_fill(self._newlines_with(left), scratch)
            mask.index_put_((self.newlines[:, 0], columns), mask.new_zeros(()))
        return dataclasses.replace(self, mask=mask[:, :-1], valid=left)

    def _staying(self, gone: Tensor, left: Tensor) -> tuple[Tensor, Tensor]:
        """The entries `bool[B, L]` that go on, padding on the left not among them, and the newlines
        `bool[M]`."""
        rows, stays = self.placed.parent[:, 1:], F.pad(self.begun, (0, 1))
        # the scratch column L takes what is not to be dropped
        stays.index_put_((rows, self.places.masked_fill(~gone, self.entries)), stays.new_zeros(()))
        if not len(self.newlines):
            return stays[:, :-1], stays.new_zeros(0)
        lives = self._newlines_with(left)
        columns = self.newlines[:, 1].masked_fill(lives, self.entries)
        stays.index_put_((self.newlines[:, 0], columns), stays.new_zeros(()))
        return stays[:, :-1], lives

    def _shortened(
        self, stays: Tensor, left: Tensor, newlines: Tensor, short: int, width: int, even: bool
    ) -> Stage:
        """The stage of the entries `bool[B, L]` and tokens `bool[G, N]` that go on, at most `short`
        and `width` of a row and a group; `even`: so many of every group."""
        source, real = ops.packed_index(stays, short)
        here = torch.arange(short, device=stays.device).expand_as(source)
        # the scratch column L is where padding comes from, and stays behind all entries
        moved = torch.full((len(source), self.entries + 1), short, device=stays.device)
        moved.scatter_(1, source.masked_fill(~real, self.entries), here.masked_fill(~real, short))
        tokens, valid = leading(*ops.packed_index(left, width), even)
        if len(newlines):
            column = moved[newlines[:, 0], newlines[:, 1]]
            newlines = torch.cat([newlines[:, :1], column[:, None], newlines[:, 2:]], 1)
        rows = self.placed.parent[:, 1:]
        return dataclasses.replace(
            self,
            source=source,
            real=real,
            columns=self.columns.gather(1, source).masked_fill(~real, 0),
            mask=self.mask.gather(1, source) & real,
            visual=self.visual.gather(1, source) & real,
            places=moved[rows, self.places.gather(1, tokens)].masked_fill(~valid, 0),
            valid=valid,
            slot=self.slot.gather(1, tokens),
            newlines=newlines,
            blend=None,
            bias=None if self.bias is None else _of(self.bias, source, real),
        )

    def _bias(self, cut: LayerCut, left: Tensor, source: Tensor, real: Tensor) -> Tensor | None:
        """What is added to attention behind a cut, of its entries."""
        bias = self.bias
        if cut.size is not None:
            bias = torch.zeros(self.mask.shape, device=source.device) if bias is None else bias
            rows = self.placed.parent[:, 1:].expand_as(self.places)[left]
            bias = bias.index_put((rows, self.places[left]), cut.size[left].float().log(), True)
        return None if bias is None else _of(bias, source, real)

    def _blend(self, cut: LayerCut) -> Blend:
        """What the hidden states of this stage become where tokens are merged."""
        used = self.valid & (cut.weight != 0)
        group, token = used.nonzero(as_tuple=True)
        return Blend(
            row=self.placed.parent[group, 1],
            into=self.places[group, cut.into[group, token]],
            part=self.places[group, token],
            weight=cut.weight[group, token].float(),
        )

    def merged(self, cut: Tensor | LayerCut) -> tuple[Tensor, Tensor] | None:
        """What a cut of this stage merges, in tokens of `Placed`, see `LayerDecision`."""
        if not isinstance(cut, LayerCut) or not cut.merges:
            return None
        group, token = (self.valid & (cut.weight != 0)).nonzero(as_tuple=True)
        into = self.slot[group, cut.into[group, token]]
        return torch.stack([group, into, self.slot[group, token]]), cut.weight[group, token]

    def _newlines_with(self, left: Tensor) -> Tensor:
        """`bool[M]`: the newlines of whose row a token is left."""
        most = max((*self.placed.tokens, 0))
        present = left.new_zeros(len(left), most + 1)
        # index 0 of the sums is an empty range
        present.scatter_(1, (self.index + 1).masked_fill(~left, 0), True)
        present[:, 0] = False
        count = present.long().cumsum(-1)
        group, first, end = self.newlines[:, 2:].unbind(-1)
        return count[group, end] > count[group, first]

    def take(self, hidden: Tensor) -> Tensor:
        """Entries of the stage before, `[k·B, L', D]`, as entries of this one."""
        here, copies = self.to(hidden.device), len(hidden) // len(self.columns)
        if here.blend is not None:
            hidden = here.blend.apply(hidden, copies)
        return ops.compact(hidden, repeated(here.source, copies), repeated(here.real, copies))

    def rope(self, x: Tensor, batch: int) -> Tensor:
        """Cosines or sines `[..., 1 or k·B, Q, D]` of these entries."""
        columns = self.columns.to(x.device)
        index = repeated(columns, batch // len(columns))[..., None]
        x = x.expand(*x.shape[:-3], batch, -1, -1)
        return x.gather(-2, index.expand(*x.shape[:-3], *index.shape[:-1], x.shape[-1]))

    def restore(self, hidden: Tensor) -> Tensor:
        """`[k·B, L, D]` -> `[k·B, Q, D]`: a dropped entry takes the last one left at or before it.

        If there is none, it takes the first.
        """
        columns, real = self.columns.to(hidden.device), self.real.to(hidden.device)
        entry = torch.arange(self.entries, device=hidden.device).expand_as(columns)
        last = columns.new_full((len(columns), self.length), -1)
        last.scatter_reduce_(1, columns, entry.masked_fill(~real, -1), "amax")
        first = real.int().argmax(-1, keepdim=True)
        last = torch.maximum(last.cummax(-1).values, first)
        last = repeated(last, len(hidden) // len(columns))
        return ops.compact(hidden, last, torch.ones_like(last, dtype=torch.bool))


def leading(index: Tensor, valid: Tensor, even: bool) -> tuple[Tensor, Tensor]:
    """What `ops.packed_index` gives with the padding behind instead of in front; `even`: there is
    none."""
    if even:
        return index, valid
    width, count = index.shape[1], valid.sum(-1, keepdim=True)
    here = torch.arange(width, device=index.device)
    there = here < count
    return index.gather(1, (here + width - count).clamp_max(width - 1)) * there, there


def _of(x: Tensor, source: Tensor, real: Tensor) -> Tensor:
    """Numbers of entries as those of the entries they become, 0 on padding."""
    return x.gather(1, source).masked_fill(~real, 0)


def repeated(x: Tensor, copies: int) -> Tensor:
    """Each row `copies` times, as generate repeats them for beams."""
    return x if copies == 1 else x.repeat_interleave(copies, 0)


def _to(data: _Data, device: torch.device) -> _Data:
    moved: dict[str, Any] = {
        field.name: _moved(getattr(data, field.name), device) for field in dataclasses.fields(data)
    }
    return dataclasses.replace(data, **moved)


def _moved(value: object, device: torch.device) -> object:
    if isinstance(value, Tensor):
        return value.to(device)
    if isinstance(value, Placed):
        return _to(value, device)
    return _to(value, device) if isinstance(value, Blend) else value
