"""Tokens dropped between decoder layers: equal to a mask from there on, in every way of running."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import cache
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.kit.models import FAMILIES, PLACEHOLDERS, build_model
from tests.kit.oracle import groups, masked_from_layer, rows_expanded_by_hand
from tests.kit.prompts import PROMPTS, Inputs, build_inputs
from vtc import ops
from vtc.runtime.layer_stage import Placed
from vtc.runtime.layers import LayerSeam
from vtc.sites import LayerView
from vtc.types import Budget

pytestmark = pytest.mark.filterwarnings("ignore:.*(do_sample|max_length|use_cache).*")

MIXED = "mixed: two images, one image, text only"
TOLERANCE = {"atol": 2e-4, "rtol": 1e-4}
MODES: dict[str, dict[str, Any]] = {
    "greedy": {},
    "beams": {"num_beams": 3},
    "sampled": {"num_return_sequences": 2, "do_sample": True, "top_k": 5},
    "static cache": {"cache_implementation": "static"},
    "no cache": {"use_cache": False},
}

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
        return torch.zeros_like(view.valid).scatter(1, keep, valid) & view.valid


@dataclass
class Run:
    """A prompt, where its tokens are, and the seam under test on a stock model."""

    family: str
    model: Any
    inputs: Inputs
    placed: Placed
    seam: LayerSeam

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
    """A stock model with the seam attached; each run on an empty cache is announced as a prefill."""
    model = model or model_of(family)
    inputs = build_inputs(family, prompt)
    placed = placed_in(family, model, inputs)
    seam = seam_on(model, method, layers)

    def announce(module: Any, args: Any, kwargs: Any) -> None:
        cached = kwargs.get("past_key_values")
        if cached is None or int(cached.get_seq_length()) == 0:
            seam.expect(placed, inputs["attention_mask"])

    hook = model.model.language_model.register_forward_pre_hook(announce, with_kwargs=True)
    seam.attach()
    try:
        yield Run(family, model, inputs, placed, seam)
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


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("family", FAMILIES)
def test_generate_equals_the_mask(family: str, mode: str) -> None:
    placed = placed_in(family, model_of(family), build_inputs(family, PROMPTS[MIXED]))
    left = {1: keeping(placed, 0.3)}
    with cutting(family, Scripted(left), (1,), PROMPTS[MIXED]) as run:
        got = generated(run, **MODES[mode])
        assert torch.equal(run.seam.decisions[0].keep, left[1])
        if mode != "no cache":  # there the last step is the last prefill
            assert run.seam.lengths == expected_lengths(run, left)
        if mode == "greedy":
            held = lengths_in(got.past_key_values)
            assert held == tuple(n + 5 for n in run.seam.lengths)
            assert held[-1] < held[0]
    with masking(run, left):
        same(got, generated(run, **MODES[mode]))


@pytest.mark.parametrize("prompt", PROMPTS)
def test_every_prompt(prompt: str) -> None:
    for family in ("llava_next", "qwen2_5_vl"):
        placed = placed_in(family, model_of(family), build_inputs(family, PROMPTS[prompt]))
        left = {1: keeping(placed, 0.4, seed=1)}
        with cutting(family, Scripted(left), (1,), PROMPTS[prompt]) as run:
            got = generated(run)
        with masking(run, left):
            same(got, generated(run))


@pytest.mark.parametrize("mode", [*MODES, "prompt lookup"])
@pytest.mark.parametrize("family", ["llava", "llava_onevision", "qwen3_vl"])
def test_several_cuts(family: str, mode: str) -> None:
    options = MODES.get(mode, {"prompt_lookup_num_tokens": 3, "max_new_tokens": 12})
    prompt = PROMPTS[MIXED] if mode in MODES else PROMPTS["batch 1"]
    placed = placed_in(family, model_of(family), build_inputs(family, prompt))
    first = keeping(placed, 0.6)
    left = {1: first, 2: first & keeping(placed, 0.5, seed=1)}
    method = Scripted(left)
    with cutting(family, method, (1, 2), prompt) as run:
        got = generated(run, **options)
    assert len({decision.entries for decision in run.seam.decisions}) == 2
    for view, before in zip(method.views, (placed.valid, first), strict=False):
        assert torch.equal(view.valid.sum(-1), before.sum(-1))
        assert view.key.shape[1] == view.query.shape[1]
    with masking(run, left):
        same(got, generated(run, **options))


@pytest.mark.parametrize("family", ["llava", "qwen2_vl", "internvl"])
def test_candidates_that_are_taken_back(family: str) -> None:
    placed = placed_in(family, model_of(family), build_inputs(family, PROMPTS["batch 1"]))
    left = {1: keeping(placed, 0.4)}
    options = {"prompt_lookup_num_tokens": 4, "max_new_tokens": 24}
    with cutting(family, Scripted(left), (1,), PROMPTS["batch 1"]) as run:
        got = generated(run, **options)
        plain = generated(run, max_new_tokens=24)
    assert torch.equal(got.sequences, plain.sequences)
    with masking(run, left):
        same(got, generated(run, **options))
