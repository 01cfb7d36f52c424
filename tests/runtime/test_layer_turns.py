"""Random conversations on one cache: equal to one pass in which each layer has its own mask."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.kit.models import build_model
from vtc.runtime.layer_stage import Placed
from vtc.runtime.layers import LayerSeam
from vtc.sites import LayerView
from vtc.types import Budget

WIDTH = 64
model_of = cache(build_model)


@dataclass
class Scripted:
    """Keeps, after each layer, what is said for the turn's tokens."""

    drops_earlier_kv: bool
    left: dict[int, Tensor]
    name: str = "scripted"
    held: dict[int, int] = field(default_factory=dict)

    def layer_cut(self, view: LayerView, budget: Budget) -> Tensor:
        batch, length = view.mask.shape
        assert view.query.shape[::2] == (batch, length)
        assert view.key.shape[::2] == (batch, self.held[view.layer] + length)
        assert view.value.shape == view.key.shape and view.key.shape[1] == view.query.shape[1]
        rows = view.parent[:, 1:].expand_as(view.columns)
        assert view.visual[rows, view.columns][view.valid].all()
        return self.left[view.layer].gather(1, view.index) & view.valid


@dataclass
class Turn:
    """New entries of every row: embeddings, mask, and where visual tokens are, if any."""

    embeds: Tensor
    mask: Tensor
    placed: Placed | None
    left: dict[int, Tensor]

    def dropped(self, layer: int) -> Tensor:
        """`bool[B, S]`: what was dropped before a layer."""
        out = torch.zeros_like(self.mask)
        for cut, keep in self.left.items():
            if self.placed is not None and cut < layer:
                gone = self.placed.valid & ~keep.gather(1, self.placed.index)
                for g, row in enumerate(self.placed.parent[:, 1].tolist()):
                    out[row, self.placed.columns[g, gone[g]]] = True
                for row, column, g, first, end in self.placed.newlines.tolist():
                    inside = (self.placed.index[g] >= first) & (self.placed.index[g] < end)
                    out[row, column] |= not bool((inside & self.placed.valid[g] & ~gone[g]).any())
        return out


def turn_of(draw: random.Random, batch: int, cuts: tuple[int, ...], text: bool) -> Turn:
    """Rows of text, images of random tokens with a newline behind each, text; left-padded.

    Some have holes: entries that the caller's mask leaves out.
    """
    rows = []
    for row in range(batch):
        parts: list[Any] = [None] * draw.randint(1, 3)
        for _ in range(0 if text else draw.randint(int(row == 0), 2)):
            # the tokens that reached the language model, of those of the image
            some = sorted(draw.sample(range(8), draw.randint(1, 8)))
            parts += [*some[: draw.randint(0, 8)], "newline", *[None] * draw.randint(0, 2)]
        rows.append(parts + [None] * draw.randint(1, 3))
    width = max(map(len, rows))
    mask = torch.tensor([[len(r) + i >= width for i in range(width)] for r in rows])
    for row, parts in enumerate(rows):
        # neither the first nor the last: what stands before a row begins is its padding
        for _ in range(draw.choice([0, 0, 3]) if len(parts) > 2 else 0):
            mask[row, width - draw.randint(2, len(parts) - 1)] = False
    columns, index, parent, newlines = [], [], [], []
    visual = torch.zeros_like(mask)
    for row, parts in enumerate(rows):
        tokens: list[tuple[int, int]] = []
        for at, part in enumerate(parts, width - len(parts)):
            if isinstance(part, int):
                tokens.append((at, part))
                visual[row, at] = True
            elif part == "newline" and tokens:
                newlines.append([row, at, len(columns), tokens[0][1], tokens[-1][1] + 1])
                columns.append([place for place, _ in tokens])
                index.append([token for _, token in tokens])
                parent.append([len(parent), row])
                tokens = []
    embeds = torch.randn(batch, width, WIDTH, generator=torch.Generator().manual_seed(width))
    if not columns:
        return Turn(embeds, mask, None, {})
    most = max(map(len, columns))
    padded = [torch.tensor([[*x, *[0] * (most - len(x))] for x in xs]) for xs in (columns, index)]
    valid = torch.tensor([[i < len(x) for i in range(most)] for x in columns])
    placed = Placed(
        *(padded[0], valid, padded[1], torch.tensor(parent), (8,) * len(columns), visual),
        torch.tensor(newlines),
    )
    left, still = {}, torch.ones(len(columns), 8, dtype=torch.bool)
    for cut in cuts:
        share = draw.choice([0.0, 0.4, 0.8, 1.0])
        still = still & torch.tensor([[draw.random() < share for _ in range(8)] for _ in columns])
        left[cut] = still
    return Turn(embeds, mask, placed, left)


@contextmanager
def masks(model: Any, by_layer: list[Tensor]) -> Iterator[None]:
    """Within it each layer attends by its own mask."""

    def hook(layer: int) -> Any:
        def given(module: Any, args: Any, kwargs: dict[str, Any]) -> Any:
            return args, {**kwargs, "attention_mask": by_layer[layer][:, None]}

        return given

    hooks = [
        layer.register_forward_pre_hook(hook(i), with_kwargs=True)
        for i, layer in enumerate(model.layers)
    ]
    try:
        yield
    finally:
        for one in hooks:
            one.remove()


def by_layer(turns: list[Turn], depth: int, drops_earlier: bool) -> list[Tensor]:
    """The reference: `bool[B, total, total]` of each layer."""
    attended = torch.cat([turn.mask for turn in turns], 1)
    of_turn = torch.cat([torch.full((turn.mask.shape[1],), i) for i, turn in enumerate(turns)])
    later = of_turn[:, None] > of_turn
    total = len(of_turn)
    causal, own = torch.ones(total, total).tril().bool(), torch.eye(total).bool()
    out = []
    for layer in range(depth):
        gone = torch.cat([turn.dropped(layer) for turn in turns], 1)
        mask = causal & (attended & ~gone)[:, None]
        if drops_earlier:
            ever = torch.cat([turn.dropped(depth) for turn in turns], 1)
            mask = mask & ~(later & ever[:, None])
        # what may attend to nothing attends to itself: nobody attends to it
        out.append(mask | (own & ~mask.any(-1, keepdim=True)))
    return out


def filled_forward(hidden: Tensor, turn: Turn, depth: int) -> Tensor:
    """Of each entry that is attended to: the last that was left at or before it."""
    gone = turn.dropped(depth)
    left = ~gone & (turn.mask.cumsum(-1) > 0)
    out = hidden.clone()
    for row in range(len(out)):
        last = int(left[row].int().argmax())
        for at in range(out.shape[1]):
            last = at if left[row, at] else last
            if turn.mask[row, at]:
                out[row, at] = hidden[row, last]
    return out


@pytest.mark.parametrize("seed", range(80))
def test_a_conversation_equals_one_pass_with_masks(seed: int) -> None:
    draw = random.Random(seed)
    family = draw.choice(["llava", "qwen2_vl", "qwen3_vl"])
    model = model_of(family)
    lm, config = model.model.language_model, model.model.language_model.config
    depth, batch, copies = len(lm.layers), draw.randint(1, 3), draw.choice([1, 1, 2])
    first = int(family == "qwen3_vl")
    cuts = tuple(sorted(draw.sample(range(first, depth - 1), draw.randint(1, 2))))
    drops_earlier = draw.random() < 0.4
    turns = [turn_of(draw, batch, cuts, text=False)]
    for _ in range(draw.randint(1, 4)):
        turns.append(turn_of(draw, batch, cuts, text=draw.random() < 0.6))
    total = sum(turn.mask.shape[1] for turn in turns)
    wide = 3 if family != "llava" else 1
    positions = torch.randint(0, 40, (wide, batch, total)).sort(-1).values
    positions = positions if wide == 3 else positions[0]
    embeds = torch.cat([turn.embeds for turn in turns], 1)
    with torch.no_grad(), masks(lm, by_layer(turns, depth, drops_earlier)):
        whole = lm(inputs_embeds=embeds, position_ids=positions, use_cache=False)
    want = whole.last_hidden_state.split([turn.mask.shape[1] for turn in turns], 1)

    from transformers import DynamicCache, StaticCache

    static = draw.random() < 0.3
    kept = StaticCache(config, max_cache_len=total + 3) if static else DynamicCache(config=config)
    method = Scripted(drops_earlier, {})
    adapter: Any = SimpleNamespace(model=model, language_model=lm)
    seam = LayerSeam(adapter, method, cuts, lambda: Budget.of(0.5))  # type: ignore[arg-type]
    seam.attach()
    start = 0
    try:
        for turn, reference in zip(turns, want, strict=True):
            end = start + turn.mask.shape[1]
            mask = torch.cat([t.mask for t in turns], 1)[:, :end].repeat_interleave(copies, 0)
            method.left = turn.left
            if turn.placed is not None:
                seam.expect(turn.placed, turn.mask)
            before = [int(kept.get_seq_length(i)) for i in range(depth)]
            method.held = dict(enumerate(before))
            # candidates of assisted decoding run along with a turn and are taken back
            more = 0 if static else draw.choice([0, 0, 2])
            given = torch.cat([turn.embeds, torch.randn(batch, more, WIDTH)], 1)
            at = torch.nn.functional.pad(positions[..., start:end].float(), (0, more), "replicate")
            whole_mask = torch.nn.functional.pad(mask.long(), (0, more), value=1)
            left_out = bool(mask.all()) and draw.random() < 0.5
            with torch.no_grad():
                got = lm(
                    inputs_embeds=given.repeat_interleave(copies, 0),
                    attention_mask=None if left_out else whole_mask,
                    position_ids=at.long().repeat_interleave(copies, -2),
                    past_key_values=kept,
                ).last_hidden_state[:, : turn.mask.shape[1]]
            expected = filled_forward(reference, turn, depth).repeat_interleave(copies, 0)
            real = turn.mask.repeat_interleave(copies, 0)
            torch.testing.assert_close(got[real], expected[real], atol=2e-4, rtol=1e-4)
            if more:
                assert kept.get_seq_length() == end + more
                kept.crop(-more)
            held = tuple(int(kept.get_seq_length(i)) for i in range(depth))
            if turn.placed is None:
                assert held == tuple(n + turn.mask.shape[1] for n in before)
            else:
                assert held == tuple(n - more for n in seam.lengths)
                assert [decision.layer for decision in seam.decisions] == list(cuts)
            start = end
    finally:
        seam.detach()
