"""Tokens dropped between decoder layers: equal to a mask from there on, in every way of running."""

from __future__ import annotations

import copy
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
from tests.kit.oracle import groups, masked_from_layer, positions, rows_expanded_by_hand
from tests.kit.prompts import PROMPTS, Inputs, build_inputs
from vtc import ops
from vtc.errors import InputError, PatchError, SignalError, UnsupportedModeError, VtcError
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


@pytest.mark.parametrize("mode", ["beams", "sampled", "static cache"])
@pytest.mark.parametrize("family", ["llava_siglip", "qwen2_vl"])
def test_a_choice_by_attention_is_the_same_in_every_mode(family: str, mode: str) -> None:
    with cutting(family, LastRow(), (1, 2), PROMPTS[MIXED]) as run:
        generated(run)
        plain = [decision.keep for decision in run.seam.decisions]
        got = generated(run, **MODES[mode])
        left = {decision.layer: decision.keep for decision in run.seam.decisions}
    counts = Budget.of(0.5).counts(run.placed.valid, run.placed.parent)
    assert torch.equal(left[1].sum(-1), counts)
    for one, other in zip(plain, left.values(), strict=True):
        assert torch.equal(one, other)
    with masking(run, left):
        same(got, generated(run, **MODES[mode]))


@pytest.mark.parametrize("family", ["llava", "qwen2_5_vl", "qwen3_vl"])
def test_what_a_method_sees_is_what_eager_attention_computes(family: str) -> None:
    method = LastRow()
    with cutting(family, method, (1,), PROMPTS[MIXED]) as run, torch.no_grad():
        run.model(**run.inputs)
    eager = build_model(family)
    eager.set_attn_implementation("eager")
    with torch.no_grad():
        seen = eager(**run.inputs, output_attentions=True).attentions[1]
    torch.testing.assert_close(method.rows[0], seen[:, :, -1].mean(1), atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("family", ["llava", "llava_onevision", "qwen3_vl"])
def test_forward_with_labels(family: str) -> None:
    placed = placed_in(family, model_of(family), build_inputs(family, PROMPTS[MIXED]))
    left = {1: keeping(placed, 0.3)}
    with cutting(family, Scripted(left), (1,), PROMPTS[MIXED]) as run:
        # only text behind text: what follows a dropped token is predicted from what was left
        text = run.inputs["attention_mask"].bool() & ~run.placed.visual & run.columns(left[1])
        text[:, 1:] &= text[:, :-1].clone()
        labels = run.inputs["input_ids"].masked_fill(~text, -100)
        options = {"labels": labels, "output_hidden_states": True, "use_cache": False}
        got = run.model(**run.inputs, **options)
        got.loss.backward()
        gradient = run.model.lm_head.weight.grad.clone()
        run.model.zero_grad()
        assert got.logits.shape[:2] == labels.shape
        assert {state.shape[1] for state in got.hidden_states} == {labels.shape[1]}
    with masking(run, left):
        want = run.model(**run.inputs, **options)
        want.loss.backward()
    torch.testing.assert_close(got.loss, want.loss, **TOLERANCE)
    torch.testing.assert_close(gradient, run.model.lm_head.weight.grad, **TOLERANCE)
    run.model.zero_grad()
    kept = run.inputs["attention_mask"].bool() & run.columns(left[1])
    for one, other in zip(got.hidden_states, want.hidden_states, strict=True):
        torch.testing.assert_close(one[kept], other[kept], **TOLERANCE)


def test_a_dropped_entry_takes_the_last_one_left() -> None:
    placed = placed_in("llava", model_of("llava"), build_inputs("llava", PROMPTS["batch 1"]))
    left = torch.zeros_like(placed.valid)
    left[0, 5] = True
    with cutting("llava", Scripted({1: left}), (1,), PROMPTS["batch 1"]) as run, torch.no_grad():
        logits = run.model(**run.inputs).logits[0]
    first = int(placed.columns[0, 0])
    for at in range(first, int(placed.columns[0].max()) + 1):
        source = first - 1 if at < first + 5 else first + 5
        assert torch.equal(logits[at], logits[source])


@pytest.mark.parametrize("family", ["llava", "qwen2_vl"])
def test_without_drops_a_run_is_the_stock_one(family: str) -> None:
    everything = {1: torch.ones(3, 200, dtype=torch.bool)}
    with cutting(family, Scripted(everything), (1,), PROMPTS[MIXED]) as run, torch.no_grad():
        got, cached = generated(run), run.model(**run.inputs).past_key_values
        assert not hasattr(cached, "_vtc_layers")
        assert run.seam.decisions[0].entries == run.inputs["input_ids"].shape[1]
        assert bool((run.seam.decisions[0].keep == run.placed.valid).all())
    want = generated(run)
    assert torch.equal(torch.stack(got.logits), torch.stack(want.logits))


def test_text_alone_is_the_stock_run() -> None:
    model = model_of("llava")
    ids = torch.arange(3, 20)[None]
    seam = seam_on(model, Scripted({}, drops_earlier_kv=True), (1,))
    with torch.no_grad():
        want = model(input_ids=ids).logits
        seam.attach()
        try:
            assert torch.equal(model(input_ids=ids).logits, want)
        finally:
            seam.detach()


@pytest.mark.parametrize("static", [False, True])
def test_keys_that_earlier_layers_stop_reading(static: bool) -> None:
    placed = placed_in("llava", model_of("llava"), build_inputs("llava", PROMPTS[MIXED]))
    left = {0: keeping(placed, 0.7), 2: keeping(placed, 0.7) & keeping(placed, 0.5, seed=1)}
    method, steps = Scripted(left, drops_earlier_kv=True), 5
    options = {"cache_implementation": "static"} if static else {}
    with cutting("llava", method, (0, 2), PROMPTS[MIXED]) as run, torch.no_grad():
        got = generated(run, max_new_tokens=steps, **options)
    new = got.sequences[:, run.inputs["input_ids"].shape[1] :]
    seen, last = run.inputs["attention_mask"], run.columns(left[2])
    with torch.no_grad(), masking(run, left):
        out = run.model(**run.inputs, position_ids=positions(run.model, run.inputs))
        for step in range(steps - 1):
            out = run.model(
                input_ids=new[:, step : step + 1],
                attention_mask=torch.cat([seen * last, torch.ones_like(new[:, : step + 1])], 1),
                position_ids=seen.sum(-1, keepdim=True) + step,
                past_key_values=out.past_key_values,
            )
            torch.testing.assert_close(out.logits[:, -1], got.logits[step + 1], **TOLERANCE)


def test_two_turns_of_generate_on_one_cache() -> None:
    prompt = PROMPTS["ragged"]
    placed = placed_in("llava", model_of("llava"), build_inputs("llava", prompt))
    left = {1: keeping(placed, 0.4)}

    def turns(run: Run) -> list[Tensor]:
        first = generated(run, max_new_tokens=4, past_key_values=None)
        more = torch.tensor([[11, 12, 13], [14, 15, 16]])
        ids = torch.cat([first.sequences, more], 1)
        grown = torch.ones(2, ids.shape[1] - run.inputs["input_ids"].shape[1], dtype=torch.long)
        second = run.model.generate(
            input_ids=ids,
            attention_mask=torch.cat([run.inputs["attention_mask"], grown], 1),
            past_key_values=first.past_key_values,
            max_new_tokens=4,
            do_sample=False,
            suppress_tokens=PLACEHOLDERS,
        )
        return [first.sequences, second]

    with cutting("llava", Scripted(left), (1,), prompt) as run:
        got = turns(run)
    with masking(run, left):
        want = turns(run)
    for one, other in zip(got, want, strict=True):
        assert torch.equal(one, other)


def test_a_static_cache_that_is_used_again_forgets() -> None:
    placed = placed_in("llava", model_of("llava"), build_inputs("llava", PROMPTS["batch 1"]))
    method = Scripted({1: keeping(placed, 0.3)})
    text = {"input_ids": torch.arange(3, 40)[None], "max_new_tokens": 5, "do_sample": False}
    with cutting("llava", method, (1,), PROMPTS["batch 1"]) as run:
        want = build_model("llava").generate(**text)
        generated(run, cache_implementation="static", max_length=60, max_new_tokens=None)
        run.announced = False
        got = run.model.generate(**text, cache_implementation="static")
    assert torch.equal(got, want)


def test_eager_attention() -> None:
    model = build_model("qwen2_vl")
    model.set_attn_implementation("eager")
    placed = placed_in("qwen2_vl", model, build_inputs("qwen2_vl", PROMPTS[MIXED]))
    left = {0: keeping(placed, 0.4)}
    with cutting("qwen2_vl", Scripted(left), (0,), PROMPTS[MIXED], model) as run:
        got = {mode: generated(run, **MODES[mode]) for mode in ("greedy", "static cache")}
    with masking(run, left):
        for mode, output in got.items():
            same(output, generated(run, **MODES[mode]))


def traces(model: Any) -> Any:
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    modules = list(model.modules())
    return (
        [(len(m._forward_pre_hooks), len(m._forward_hooks)) for m in modules],
        [id(vars(m).get("config")) for m in modules],
        [list(vars(m)) for m in modules],
        sorted(ALL_ATTENTION_FUNCTIONS.keys()),
    )


class Broken(Exception):
    pass


@pytest.mark.parametrize("kind", [Broken, KeyboardInterrupt])
def test_a_broken_choice_leaves_nothing(kind: type[BaseException]) -> None:
    model = model_of("llava")
    inputs = build_inputs("llava", PROMPTS[MIXED])
    with torch.no_grad():
        want = model(**inputs).logits
    before = traces(model)

    class Breaks(Scripted):
        def layer_cut(self, view: LayerView, budget: Budget) -> Tensor:
            raise kind("no")

    with cutting("llava", Breaks({}), (1,), PROMPTS[MIXED]) as run, torch.no_grad():
        attached = traces(model)
        with pytest.raises(kind):
            model(**inputs)
        if kind is Broken:
            assert traces(model) == attached
        run.announced = False
        model.model.language_model(inputs_embeds=torch.zeros(1, 3, 64))
        assert traces(model) == attached
        run.seam.attach()
        assert traces(model) == attached
    assert traces(model) == before
    with torch.no_grad():
        assert torch.equal(model(**inputs).logits, want)


@pytest.mark.parametrize("keep", [torch.ones(3, 7, dtype=torch.bool), torch.ones(3, 36), None])
def test_a_choice_of_another_shape_is_refused(keep: Any) -> None:
    class Wrong(Scripted):
        def layer_cut(self, view: LayerView, budget: Budget) -> Tensor:
            return keep

    with (
        cutting("llava", Wrong({}), (1,), PROMPTS[MIXED]) as run,
        pytest.raises(VtcError, match="expected a tensor of bool"),
    ):
        run.model(**run.inputs)


def test_layers_that_cannot_be_cut_after_are_refused() -> None:
    with pytest.raises(SignalError, match=r"expected layers 0\.\.2"):
        seam_on(model_of("llava"), Scripted({}), (3,))
    with pytest.raises(SignalError, match="expected layer 1 or later"):
        seam_on(model_of("qwen3_vl"), Scripted({}), (0, 2))
    model = build_model("llava")
    model.model.language_model.config.sliding_window = 16
    with pytest.raises(UnsupportedModeError, match="slides over 16"):
        seam_on(model, Scripted({}), (1,))
    seam_on(model, Scripted({}), ())


def test_training_with_checkpoints_is_refused() -> None:
    model = build_model("llava").train()
    model.gradient_checkpointing_enable()
    with (
        cutting("llava", Scripted({}), (1,), PROMPTS[MIXED], model) as run,
        pytest.raises(UnsupportedModeError, match="gradient checkpointing"),
    ):
        run.model(**run.inputs)


def test_a_prompt_in_pieces_is_refused() -> None:
    with (
        cutting("llava", Scripted({}), (1,), PROMPTS["batch 1"]) as run,
        pytest.raises(UnsupportedModeError, match="prefill_chunk_size"),
    ):
        generated(run, prefill_chunk_size=8)


def test_what_a_cut_cache_cannot_go_through_is_refused() -> None:
    placed = placed_in("llava", model_of("llava"), build_inputs("llava", PROMPTS["batch 1"]))
    method, one = Scripted({1: keeping(placed, 0.3)}), torch.ones(1, 1, dtype=torch.long)
    with cutting("llava", method, (1,), PROMPTS["batch 1"]) as run, torch.no_grad():
        cached = run.model(**run.inputs).past_key_values
        length = run.inputs["input_ids"].shape[1]
        with pytest.raises(InputError, match="attention mask"):
            run.model(input_ids=one, past_key_values=cached, attention_mask=one)
        with pytest.raises(UnsupportedModeError, match="same batch"):
            run.model(input_ids=one.repeat(2, 1), past_key_values=cached)
        cached.crop(-3)
        mask = torch.ones(1, length - 2, dtype=torch.long)
        run.model(input_ids=one, past_key_values=cached, attention_mask=mask)
        cached.crop(-12)
        with pytest.raises(UnsupportedModeError, match="taken back"):
            run.model(input_ids=one, past_key_values=cached)


def test_a_model_with_the_seam_is_not_copied() -> None:
    with (
        cutting("llava", Scripted({}), (1,), PROMPTS["batch 1"]) as run,
        pytest.raises(PatchError, match="copied or pickled"),
    ):
        copy.deepcopy(run.model.model.language_model)
