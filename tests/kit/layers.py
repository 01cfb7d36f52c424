"""The seam between decoder layers on a stock model, methods to drive it, and its oracle."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import cache
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from vtc import ops
from vtc.runtime.layer_stage import Placed
from vtc.runtime.layers import LayerSeam
from vtc.sites import LayerView
from vtc.types import Budget

from .models import PLACEHOLDERS, build_model
from .oracle import groups, masked_from_layer, rows_expanded_by_hand
from .prompts import Inputs, build_inputs

TOLERANCE = {"atol": 2e-4, "rtol": 1e-4}

model_of = cache(build_model)


@dataclass
class Scripted:
    """Keeps, after each layer, the tokens `bool[G, N]` said for it."""

    left: dict[int, Tensor]
    drops_earlier_kv: bool = False
    name: str = "scripted"
    views: list[LayerView] = field(default_factory=list)

    def layer_cut(self, view: LayerView, budget: Budget) -> Tensor:
        self.views.append(view)
        return self.left[view.layer].gather(1, view.index) & view.valid


@dataclass
class LastRow:
    """Keeps the half of each image's tokens that the last entry attends to most."""

    drops_earlier_kv: bool = False
    name: str = "last row"
    rows: list[Tensor] = field(default_factory=list)

    def layer_cut(self, view: LayerView, budget: Budget) -> Tensor:
        held = view.key.shape[2] - view.mask.shape[1]
        seen = torch.nn.functional.pad(view.mask, (held, 0), value=True)
        row = ops.attention_rows(view.query[:, :, -1:], view.key, view.scale, seen)[:, 0]
        self.rows.append(row)
        scores = row[view.parent[:, 1:], held + view.columns]
        counts = budget.counts(view.valid, view.parent)
        keep, valid = ops.group_topk(scores, view.valid, counts)
        wide = torch.nn.functional.pad(torch.zeros_like(view.valid), (0, 1))
        return wide.scatter(1, keep.masked_fill(~valid, wide.shape[1] - 1), True)[:, :-1]


@dataclass
class Run:
    """A prompt, where its tokens are, and the seam under test on a stock model."""

    family: str
    model: Any
    inputs: Inputs
    placed: Placed
    seam: LayerSeam
    announced: bool = True

    def columns(self, keep: Tensor) -> Tensor:
        """`bool[B, S]`, False where `keep [G, N]` drops a token, or the whole row of a newline."""
        out = torch.ones_like(self.placed.visual)
        for g, group in enumerate(groups(self.model, self.family, self.inputs)):
            mask = keep[g, : len(group.tokens)]
            out[tuple(group.tokens[~mask].T)] = False
            for newline in group.newlines:
                out[tuple(newline.place)] = bool(mask[newline.members].any())
        return out


def placed_in(family: str, model: Any, inputs: Inputs) -> Placed:
    found = groups(model, family, inputs)
    lengths = [len(group.tokens) for group in found]
    columns = torch.zeros(len(found), max(lengths), dtype=torch.long)
    valid = torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]
    visual = torch.zeros_like(inputs["input_ids"], dtype=torch.bool)
    newlines = []
    for g, group in enumerate(found):
        columns[g, : lengths[g]] = group.tokens[:, 1]
        visual[tuple(group.tokens.T)] = True
        for newline in group.newlines:
            first, end = int(newline.members.min()), int(newline.members.max()) + 1
            newlines.append([*newline.place.tolist(), g, first, end])
    return Placed(
        columns=columns,
        valid=valid,
        index=torch.arange(max(lengths)).expand_as(columns).masked_fill(~valid, 0),
        parent=torch.tensor([[g, int(group.tokens[0, 0])] for g, group in enumerate(found)]),
        tokens=tuple(lengths),
        visual=visual,
        newlines=torch.tensor(newlines, dtype=torch.long).view(-1, 5),
    )


def keeping(placed: Placed, share: float, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return (torch.rand(placed.valid.shape, generator=generator) < share) & placed.valid


def seam_on(model: Any, method: Any, layers: tuple[int, ...]) -> LayerSeam:
    adapter: Any = SimpleNamespace(model=model, language_model=model.model.language_model)
    return LayerSeam(adapter, method, layers, lambda: Budget.of(0.5))


@contextmanager
def cutting(
    family: str,
    method: Any,
    layers: tuple[int, ...],
    prompt: Sequence[Any],
    model: Any = None,
) -> Iterator[Run]:
    """A stock model with the seam attached; runs on an empty cache are announced as prefills."""
    model = model or model_of(family)
    inputs = build_inputs(family, prompt)
    placed = placed_in(family, model, inputs)
    seam = seam_on(model, method, layers)
    run = Run(family, model, inputs, placed, seam)

    def announce(module: Any, args: Any, kwargs: Any) -> None:
        cached = kwargs.get("past_key_values")
        if run.announced and (cached is None or int(cached.get_seq_length()) == 0):
            seam.expect(placed, inputs["attention_mask"])

    hook = model.model.language_model.register_forward_pre_hook(announce, with_kwargs=True)
    seam.attach()
    try:
        yield run
    finally:
        seam.detach()
        hook.remove()


@contextmanager
def masking(run: Run, left: dict[int, Tensor]) -> Iterator[None]:
    """The oracle: in layers behind each cut what it drops is masked."""
    with ExitStack() as stack:
        for layer, keep in left.items():
            stack.enter_context(masked_from_layer(run.model, layer + 1, run.columns(keep)))
        yield


def generated(run: Run, **options: Any) -> Any:
    torch.manual_seed(0)
    given = {
        "max_new_tokens": 6,
        "do_sample": False,
        "suppress_tokens": PLACEHOLDERS,
        "return_dict_in_generate": True,
        "output_logits": True,
        **options,
    }
    with rows_expanded_by_hand(run.model, run.family):
        return run.model.generate(**run.inputs, **given)


def same(got: Any, want: Any) -> None:
    assert torch.equal(got.sequences, want.sequences)
    if got.logits is not None:
        torch.testing.assert_close(torch.stack(got.logits), torch.stack(want.logits), **TOLERANCE)


def lengths_in(cached: Any) -> tuple[int, ...]:
    return tuple(int(cached.get_seq_length(i)) for i in range(len(cached.layers)))


def expected_lengths(run: Run, left: dict[int, Tensor]) -> tuple[int, ...]:
    """What each layer's cache must hold behind a prefill."""
    mask = run.inputs["attention_mask"].bool()
    out = []
    for layer in range(len(run.model.model.language_model.layers)):
        columns = torch.ones_like(mask)
        for cut, keep in left.items():
            if cut < layer:
                columns &= run.columns(keep)
        whole = bool(columns.all())
        out.append(mask.shape[1] if whole else int((columns & mask).sum(-1).max()))
    return tuple(out)
