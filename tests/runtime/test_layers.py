"""Tokens dropped between decoder layers: equal to a mask from there on, in every way of running."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from tests.kit.flash import use_like_flash
from tests.kit.layers import (
    TOLERANCE,
    LastRow,
    Run,
    Scripted,
    cutting,
    expected_lengths,
    generated,
    keeping,
    lengths_in,
    masking,
    model_of,
    placed_in,
    same,
    seam_on,
)
from tests.kit.models import FAMILIES, PLACEHOLDERS, build_model
from tests.kit.oracle import positions
from tests.kit.prompts import PROMPTS, build_inputs
from vtc.types import Budget

pytestmark = pytest.mark.filterwarnings("ignore:.*(do_sample|max_length|use_cache).*")

MIXED = "mixed: two images, one image, text only"
MODES: dict[str, dict[str, Any]] = {
    "greedy": {},
    "beams": {"num_beams": 3},
    "sampled": {"num_return_sequences": 2, "do_sample": True, "top_k": 5},
    "static cache": {"cache_implementation": "static"},
    "no cache": {"use_cache": False},
}


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


@pytest.mark.parametrize("prompt", ["batch 1", MIXED])
@pytest.mark.parametrize("family", ["llava", "qwen2_vl"])
def test_masks_as_flash_attention_takes_them(
    family: str, prompt: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    flash, stock = build_model(family), model_of(family)
    use_like_flash(flash, monkeypatch)
    placed = placed_in(family, stock, build_inputs(family, PROMPTS[prompt]))
    left = {1: keeping(placed, 0.4)}
    with cutting(family, Scripted(left), (1,), PROMPTS[prompt], flash) as run:
        got = generated(run)
    run.model = stock
    with masking(run, left):
        same(got, generated(run))
