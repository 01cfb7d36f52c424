"""What methods see inside the encoder and the LLM, built by hand or at random."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from vtc.entrance import Entrance, Heads
from vtc.methods.base import Method
from vtc.sites import BlockView, Facts, LayerView
from vtc.types import Budget


@dataclass(frozen=True)
class Rows:
    """Rows of an encoder at random; what a row holds in a block depends on its seed alone.

    Attributes:
        units: units of each row.
        seeds: by default the number of the row.
        images: rows of each image; by default each row is one.
        m: patches per unit.
        cls: whether there is a [CLS].
        tap: the block whose output the LLM reads.
        extra: columns of padding beyond the longest row.
        filler: what padding holds.
    """

    units: Sequence[int]
    seeds: Sequence[int] = ()
    images: Sequence[int] = ()
    m: int = 1
    cls: bool = True
    tap: int = 5
    extra: int = 0
    filler: float = 0.0
    video: bool = False

    def part(self, row: int, block: int) -> torch.Tensor:
        """Queries, keys and values of one row, `[3, H, c + U·m, d]`."""
        seed = (self.seeds or range(len(self.units)))[row]
        draw = torch.Generator().manual_seed(1000 * seed + block)
        return 2 * torch.randn(3, 2, self.cls + self.units[row] * self.m, 8, generator=draw)

    def view(
        self,
        block: int = 0,
        left: Sequence[Sequence[int]] | None = None,
        carry: Mapping[str, Sequence[Sequence[float]]] | None = None,
    ) -> BlockView:
        """What a method sees after `block` if of each row the units `left` are there."""
        left = left or [range(n) for n in self.units]
        width = max(map(len, left)) + self.extra
        parts = torch.full((3, len(left), 2, self.cls + width * self.m, 8), self.filler)
        index = torch.zeros(len(left), width, dtype=torch.int64)
        carried = {name: torch.full(index.shape, self.filler) for name in carry or {}}
        for r, units in enumerate(left):
            whole, at = self.part(r, block), torch.tensor(list(units), dtype=torch.int64)
            body = whole[:, :, self.cls :].unflatten(2, (-1, self.m))[:, :, at].flatten(2, 3)
            row = torch.cat([whole[:, :, : self.cls], body], 2)
            parts[:, r, :, : row.shape[2]] = row
            index[r, : len(at)] = at
            for name, x in carried.items():
                x[r, : len(at)] = torch.tensor((carry or {})[name][r])
        images = torch.tensor(self.images or [1] * len(left))
        image = torch.repeat_interleave(torch.arange(len(images)), images)
        units_of = torch.tensor(self.units)
        return BlockView(
            block=block,
            tap=self.tap,
            valid=torch.arange(width) < torch.tensor([len(u) for u in left])[:, None],
            index=index,
            units=units_of,
            image=image,
            tokens=tuple(int(units_of[image == i].sum()) for i in range(len(images))),
            rows=tuple(images.tolist()),
            has_cls=self.cls,
            query=parts[0],
            key=parts[1],
            value=parts[2],
            scale=8**-0.5,
            carry=carried,
            video=(self.video,) * len(images),
        )


def run_encoder(
    method: Method, keep: Any, view: Callable[..., BlockView], blocks: int
) -> list[list[list[int]]]:
    """What is left of each row after each block, when the cuts of `method` are carried out."""
    budget, left, carry, found = Budget.of(keep), None, None, []
    for block in range(blocks):
        seen = view(block, left, carry)
        cut = method.encoder_cut(seen, budget)
        keep_at = seen.valid if cut.keep is None else cut.keep
        assert keep_at.dtype == torch.bool and keep_at.shape == seen.valid.shape
        assert not (keep_at & ~seen.valid).any()
        left = [seen.index[r, row].tolist() for r, row in enumerate(keep_at)]
        carry = {
            name: [x[r, row].tolist() for r, row in enumerate(keep_at)]
            for name, x in cut.carry.items()
        }
        found.append(left)
    return found


def stated_view(
    blocks: Sequence[Mapping[str, Sequence[float]]], cls: bool, m: int
) -> Callable[..., BlockView]:
    """One row, one head, whose keys are `keys` of each block, per patch, or whose attention,
    likeness and size of values are `a`, `g` and `m`: softmax of log a, of log g, and first
    coordinates filled up to norm m."""

    def view(block: int, left: Any, carry: Any) -> BlockView:
        given = blocks[block]
        units = len(given.get("keys", given.get("a", ()))) // m
        at = torch.tensor(left[0] if left else range(units))
        patches = (at[:, None] * m + torch.arange(m)).flatten()
        a, size = (
            torch.tensor(given.get(name, [1.0] * (units * m)))[patches] for name in ("a", "m")
        )
        like = torch.tensor(given.get("g", [1.0] * (units * m)))[patches].log()
        # softmax does not mind a shift: the one that leaves each |log g| at most m
        low, high = (like - size).max(), (like + size).min()
        assert low <= high, "no value has this g and this m"
        like = like - (low + high) / 2
        query, key, value = torch.zeros(3, 1, 1, cls + len(patches), 2)
        query[..., 0], key[0, 0, cls:, 0] = 1, a.log()
        if "keys" in given:
            key[0, 0, cls:] = torch.tensor(given["keys"])[patches]
        value[0, 0, cls:] = torch.stack([like, size - like.abs()], -1)
        if cls:
            value[0, 0, 0, 0] = 1
        return BlockView(
            block=block,
            tap=len(blocks),
            valid=torch.ones(1, len(at), dtype=torch.bool),
            index=at[None],
            units=torch.tensor([units]),
            image=torch.tensor([0]),
            tokens=(units,),
            rows=(1,),
            has_cls=cls,
            query=query,
            key=key,
            value=value,
            scale=1.0,
            carry={name: torch.tensor(x) for name, x in (carry or {}).items()},
            video=(False,),
        )

    return view


def layer_view(
    rows: Sequence[Sequence[int | None]],
    *,
    n: int = 6,
    past: int = 0,
    pad: str = "left",
    heads: int = 2,
    dim: int = 8,
    seed: int = 0,
    layer: int = 1,
    **parts: Any,
) -> LayerView:
    """A row is text lengths with None for an image of `n` tokens; a row is a function of its
    content alone. `parts` replaces query, key, value or scale."""
    kinds = [
        [part is None for part in row for _ in range(n if part is None else part)] for row in rows
    ]
    width = max(map(len, kinds))
    shape = len(rows), heads, past + width, dim
    made = {name: torch.zeros(shape) for name in ("query", "key", "value")}
    mask = torch.zeros(len(rows), width, dtype=torch.bool)
    visual = mask.clone()
    columns, parent = [], []
    for b, kind in enumerate(kinds):
        start = width - len(kind) if pad == "left" else 0
        span = slice(start, start + len(kind))
        mask[b, span], visual[b, span] = True, torch.tensor(kind)
        draw = torch.Generator().manual_seed(seed + len(kind) + 97 * sum(kind))
        for tensor in made.values():
            tensor[b, :, :past] = torch.randn(heads, past, dim, generator=draw)
            tensor[b, :, past + start : past + start + len(kind)] = torch.randn(
                heads, len(kind), dim, generator=draw
            )
        for i in range(sum(kind) // n):
            columns.append(visual[b].nonzero()[i * n : (i + 1) * n, 0])
            parent.append([len(parent), b])
    return LayerView(
        layer=layer,
        valid=torch.ones(len(columns), n, dtype=torch.bool),
        index=torch.arange(n).expand(len(columns), -1),
        columns=torch.stack(columns),
        parent=torch.tensor(parent),
        tokens=(n,) * len(columns),
        mask=mask,
        visual=visual,
        query=parts.get("query", made["query"][:, :, past:]),
        key=parts.get("key", made["key"]),
        value=parts.get("value", made["value"]),
        scale=parts.get("scale", dim**-0.5),
    )


def stated_layer(case: Mapping[str, Any]) -> LayerView:
    """A prompt of v (visual), t (text) and a blank for padding at the left, one head, one image.

    `query`, `key` and `hidden` hold a row for each entry; `last_row` says in the place of the first
    two what the last entry attends to: a softmax of the logarithms of these numbers. What the next
    layer computes with is `next_row`, in the same way, or `next_query` and `next_key`; `embeds` are
    the input embeddings. `layer`, `depth` and `heads` are of the model.
    """
    entries = case["entries"]
    visual = torch.tensor([kind == "v" for kind in entries])
    columns = visual.nonzero()[:, 0]
    query, key = (_rows(case.get(name), len(entries)) for name in ("query", "key"))
    if "last_row" in case:
        query, key = _looking(case["last_row"])
    empty = torch.zeros(1, 1, len(entries), 1)
    hidden = _rows(case.get("hidden"), len(entries))[0]
    entrance = Entrance(
        embeds=_rows(case.get("embeds"), len(entries))[0],
        mask=torch.tensor([[kind != " " for kind in entries]]),
        visual=visual[None],
        entry=torch.arange(len(entries))[None],
        angles=(torch.ones(1, len(entries), 2), torch.zeros(1, len(entries), 2)),
    )

    def ahead(rotary: bool) -> Heads:
        if "next_row" in case:
            return Heads(*_looking(case["next_row"]), empty, 1.0)
        query, key = (_rows(case[name], len(entries)) for name in ("next_query", "next_key"))
        return Heads(query, key, empty, 1.0)

    return LayerView(
        layer=case["layer"],
        valid=torch.ones(1, len(columns), dtype=torch.bool),
        index=torch.arange(len(columns))[None],
        columns=columns[None],
        parent=torch.zeros(1, 2, dtype=torch.int64),
        tokens=(case.get("tokens", len(columns)),),
        mask=entrance.mask,
        visual=visual[None],
        query=query,
        key=key,
        value=empty,
        scale=1.0,
        hidden=hidden,
        facts=Facts(24, 22, True, 1, False, case.get("depth", 32), llm_heads=1),
        entrance=lambda: entrance,
        final_norm=lambda x: x,
        ahead=ahead,
    )


def _rows(given: Sequence[Sequence[float]] | None, n: int) -> torch.Tensor:
    return torch.tensor(given if given is not None else [[0.0]] * n)[None, None]


def _looking(shares: Sequence[float]) -> tuple[torch.Tensor, torch.Tensor]:
    """Queries of one and keys whose softmax is in the proportion of these numbers."""
    key = torch.tensor(shares).clamp_min(1e-9).log()[None, None, :, None]
    return torch.ones_like(key), key
