"""Prefills with cuts between decoder layers as one captured call: the answers, the tokens and the
caches of the plain path, from replays that run none of its Python."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import Any

import pytest
import torch

import vtc
from tests.kit.answers import answered
from tests.kit.frozen import frozen
from tests.kit.models import build_model
from tests.kit.prompts import build_inputs, prompts
from vtc.errors import VtcError
from vtc.methods.fastv import FastV
from vtc.selectors import Selector, TopK

# what says how much is left: sizes alone, behind one layer or several, or what is seen; of that,
# too, where everything goes and where nothing does
METHODS: dict[str, tuple[str, dict[str, Any]]] = {
    "todre": ("todre", {}),
    "todre drops all": ("todre", {"tau": 2.0}),
    "todre drops none": ("todre", {"tau": 0.0}),
    "stage 2 alone": ("todre", {"stage1": False, "tau": 2.0}),
    "flowcut": ("flowcut", {"llm_cut": "on"}),
    "fastv": ("fastv", {}),
    "pyramiddrop": ("pyramiddrop", {}),
}
# newlines; rotary positions of several axes and grouped heads
FAMILIES = ("llava_next", "qwen2_5_vl")
MIXED = "mixed: two images, one image, text only"


@pytest.fixture(autouse=True)
def as_a_graph() -> Iterator[None]:
    with frozen():
        yield


def generated(model: Any, inputs: dict[str, Any], **more: Any) -> Any:
    return answered(model, inputs, 4, **more)


def patched(model: Any, case: str, fast: Any = False) -> Any:
    method, options = METHODS[case]
    keep = None if options.get("stage1") is False else 0.3
    return vtc.patch(model, method, keep, fast=fast, **options)


def same(got: Any, want: Any) -> None:
    assert torch.equal(got.sequences, want.sequences)
    for a, b in zip(got.logits, want.logits, strict=True):
        torch.testing.assert_close(a, b, atol=2e-5, rtol=1e-4)


def agree(model: Any, inputs: list[dict[str, Any]], case: str) -> None:
    """Compares tokens, logits of both entrances and what each cut kept, call by call."""

    def ran(handle: Any, given: dict[str, Any]) -> tuple[Any, ...]:
        answer = generated(model, given)
        masks = [s.mask() for s in handle.token_selections]
        with torch.no_grad():
            logits = model(**given).logits * given["attention_mask"][..., None]
        return answer, masks, handle.report().layer_tokens, logits

    with patched(model, case) as handle:
        want = [ran(handle, given) for given in inputs]
    with patched(model, case, "eager") as handle:
        for given, (answer, masks, layers, logits) in zip(inputs, want, strict=True):
            got, found, counts, seen = ran(handle, given)
            # what came twice is captured: by generate, then by the call behind it
            assert handle.report().fast["prefill"] == "eager"
            same(got, answer)
            assert len(found) == len(masks) and all(map(torch.equal, found, masks))
            assert counts == layers
            torch.testing.assert_close(seen, logits, atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("case", METHODS)
@pytest.mark.parametrize("family", FAMILIES)
def test_replays_decide_on_new_numbers(family: str, case: str) -> None:
    rows = prompts(family)["ragged"]
    inputs = [build_inputs(family, rows, seed=seed) for seed in (0, 0, 1)]
    agree(build_model(family), inputs, case)


@pytest.mark.parametrize("case", ["todre drops all", "pyramiddrop"])
def test_rows_with_several_images_and_with_none(case: str) -> None:
    inputs = [build_inputs("llava", prompts("llava")[MIXED], seed=seed) for seed in (0, 1)]
    agree(build_model("llava"), inputs, case)


@pytest.mark.slow
@pytest.mark.parametrize("case", METHODS)
@pytest.mark.parametrize("family", ["llava", "llava_next", "qwen2_vl", "qwen2_5_vl", "internvl"])
def test_every_prompt(family: str, case: str) -> None:
    for rows in prompts(family).values():
        agree(build_model(family), [build_inputs(family, rows)], case)


def lengths(method: str, keep: Any, fast: Any, **options: Any) -> tuple[int, ...]:
    model, inputs = build_model("llava"), build_inputs("llava", [[3, "image", 5]])
    with vtc.patch(model, method, keep, fast=fast, **options) as handle:
        generated(model, inputs)
        return tuple(handle.report().kv_lengths)


def test_what_is_dropped_leaves_the_cache() -> None:
    plain, fast = (lengths("todre", 0.3, f, tau=2.0) for f in (False, "eager"))
    assert plain[-1] == fast[-1] == 3 + 5 < plain[0]
    # behind a cut whose count is known, rows are padded to a multiple of 32
    plain, fast = (lengths("fastv", 2, f) for f in (False, "eager"))
    assert plain[0] - plain[-1] == 36 - 2
    assert fast[-1] % 32 == 0 and plain[0] - plain[-1] - 32 < fast[0] - fast[-1]


@torch.no_grad()
@pytest.mark.parametrize("case", ["todre drops all", "fastv"])
def test_a_cache_that_a_forward_hands_out_goes_on(case: str) -> None:
    model, inputs = build_model("llava"), build_inputs("llava", prompts("llava")["ragged"])
    mask = inputs["attention_mask"]
    next_ids, more = torch.tensor([[7], [8]]), torch.cat([mask, torch.ones_like(mask[:, :1])], 1)
    found: list[torch.Tensor] = []
    for fast in (False, "eager"):
        with patched(model, case, fast):
            for _ in range(2):
                cache = model(**inputs).past_key_values
                step = model(input_ids=next_ids, attention_mask=more, past_key_values=cache)
                found.append(step.logits)
    for step_logits in found[1:]:
        torch.testing.assert_close(step_logits, found[0], atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("positions", ["published", "renumber"])
def test_where_positions_are_counted_anew_the_report_says_why_it_is_not_captured(
    positions: str,
) -> None:
    model, inputs = build_model("llava"), build_inputs("llava", prompts("llava")["ragged"])
    answers = []
    for fast in (False, "eager"):
        with vtc.patch(model, "fastv", 0.3, positions=positions, fast=fast) as handle:
            answers.append(generated(model, inputs))
    same(*answers)
    told = handle.report().fast["prefill"]
    assert ("positions are counted anew" in told) == (positions == "renumber")


@pytest.mark.parametrize("case", ["todre", "fastv"])
def test_what_every_layer_gives_is_left_to_the_layers(case: str) -> None:
    model, inputs = build_model("llava"), build_inputs("llava", prompts("llava")["ragged"])
    states = []
    for fast in (False, "eager"):
        with patched(model, case, fast) as handle, torch.no_grad():
            states.append(model(**inputs, output_hidden_states=True).hidden_states)
    assert "hidden states" in handle.report().fast["prefill"]
    for a, b in zip(*states, strict=True):
        there = inputs["attention_mask"][..., None] * torch.ones_like(a)
        torch.testing.assert_close(a * there, b * there, atol=2e-5, rtol=1e-4)


def test_a_hook_on_a_layer_is_called() -> None:
    model, inputs = build_model("llava"), build_inputs("llava", prompts("llava")["ragged"])
    hook = model.model.language_model.layers[-1].register_forward_hook(
        lambda module, args, out: -out
    )
    try:
        with patched(model, "fastv"):
            want = generated(model, inputs)
        with patched(model, "fastv", "eager") as handle:
            same(generated(model, inputs), want)
            assert handle.report().fast["prefill"] != "eager"
    finally:
        hook.remove()


@pytest.mark.parametrize("case", ["todre", "fastv"])
def test_a_layer_that_somebody_else_runs_is_left_to_him(case: str) -> None:
    model, inputs = build_model("llava"), build_inputs("llava", prompts("llava")["ragged"])
    layer = model.model.language_model.layers[1]
    stock = layer.forward
    layer.forward = functools.wraps(stock)(lambda *a, **k: 2 * stock(*a, **k))
    with patched(model, case):
        want = generated(model, inputs)
    with patched(model, case, "eager") as handle:
        for _ in range(3):
            same(generated(model, inputs), want)
        assert handle.report().fast["prefill"] != "eager"


def test_an_interrupt_in_a_forward_leaves_nothing_to_the_next_call() -> None:
    model, inputs = build_model("llava"), build_inputs("llava", prompts("llava")["ragged"])
    layers = model.model.language_model.layers

    def interrupt(*given: Any) -> None:
        raise KeyboardInterrupt

    with patched(model, "todre", "eager"):
        # a hook on a later layer: those before the cut are captured by themselves
        hook = layers[-1].mlp.register_forward_pre_hook(interrupt)
        with torch.no_grad(), pytest.raises(KeyboardInterrupt):
            model(**inputs)
        hook.remove()
        generated(model, inputs)
        assert not any("forward" in vars(layer) for layer in layers)


def test_times_of_decisions_are_part_of_the_selector() -> None:
    model, inputs = build_model("llava"), build_inputs("llava", prompts("llava")["ragged"])
    with patched(model, "pyramiddrop", "eager") as handle:
        generated(model, inputs)
        clock = handle._session.layers.clock
        assert clock is not None and len(clock._spans) >= 3 and clock.spanned("llm") > 0


class _Fewer(Selector):
    """Says that it keeps as many as asked for, and keeps one less."""

    name = "fewer"

    def __call__(self, tokens: Any, scores: Any, counts: torch.Tensor) -> Any:
        return TopK()(tokens, scores, (counts - 1).clamp_min(1))


def test_numbers_of_tokens_that_are_not_what_was_said_are_an_error() -> None:
    model, inputs = build_model("llava"), build_inputs("llava", prompts("llava")["ragged"])
    method = FastV(selector=_Fewer())
    # only the highest scores are known to leave as many as they say
    with vtc.patch(model, method, 0.3, fast="eager") as handle:
        generated(model, inputs)
        assert handle.report().fast["prefill"] != "eager"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(FastV, "capture_refusal", lambda self: None)
        with (
            vtc.patch(model, method, 0.3, fast="eager"),
            pytest.raises(VtcError, match="sizes say"),
        ):
            generated(model, inputs)
