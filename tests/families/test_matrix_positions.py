"""`positions="renumber"` of every family × method: the stock language model on the short sequence
alone, its positions counted anew by a loop, again in the layers behind each cut."""

from __future__ import annotations

import dataclasses
from contextlib import ExitStack
from typing import Any

import pytest
import torch
from torch import Tensor

import vtc
from tests.kit import turns
from tests.kit.answers import answered
from tests.kit.fed import packed
from tests.kit.matrix import (
    MODES,
    SAME_AS,
    SPECS,
    Spec,
    cached_inputs,
    cells,
    others,
    patched,
    run,
    run_fed,
    some,
    statement,
    want,
)
from tests.kit.models import FAMILIES, QWEN, build_model
from tests.kit.oracle import groups, kept_columns, masked_from_layer, positions
from tests.kit.prompts import Inputs, build_inputs
from tests.kit.recounted import recounted_from_layer
from vtc.adapters.registry import adapter_of
from vtc.runtime.tower import facts_of

pytestmark = pytest.mark.filterwarnings("ignore:.*(do_sample|max_length).*")


def images_of(family: str, spec: Spec, inputs: Inputs) -> Tensor:
    """Which image or video each column belongs to, −1 for text: `[B, S]`."""
    out = torch.full_like(inputs["input_ids"], -1)
    for g, group in enumerate(groups(spec.model(family), family, inputs)):
        out[tuple(group.tokens.T)] = g
    return out


def compare(family: str, spec: Spec, prompts: list[str], mode: str = "greedy") -> None:
    model, options = spec.model(family), MODES[SAME_AS.get(mode, mode)]
    for prompt in prompts:
        inputs = cached_inputs(family, prompt)
        with patched(spec, family, positions="renumber") as decision:
            got = run(model, inputs, **MODES[mode])
            made = decision()
        image = images_of(family, spec, inputs)
        if spec.over_layers or (made.first is not None and made.first.is_identity):
            # nothing is dropped before the LLM
            whole = positions(model, inputs)
            with ExitStack() as stack:
                for layer, selection in made.later.items():
                    left = kept_columns(model, family, inputs, selection)
                    left = left & inputs["attention_mask"].bool()
                    anew = recounted_from_layer(model, layer + 1, whole, image, left)
                    stack.enter_context(anew)
                assert torch.equal(got, want(spec, family, inputs, made, mode)), prompt
            continue
        given, kept = statement(model, spec, family, inputs, made)
        short, columns = packed(given, image, kept)
        with ExitStack() as stack:
            for layer, selection in made.later.items():
                left = kept_columns(model, family, inputs, selection)
                seen = torch.zeros_like(short.mask, dtype=torch.bool)
                of = torch.full_like(short.mask, -1)
                for row, at in enumerate(columns):
                    seen[row, len(seen[row]) - len(at) :] = left[row, at]
                    of[row, len(seen[row]) - len(at) :] = image[row, at]
                stack.enter_context(masked_from_layer(model, layer + 1, seen))
                anew = recounted_from_layer(model, layer + 1, short.positions, of, seen)
                stack.enter_context(anew)
            assert torch.equal(run_fed(model, short, **options), got), prompt


@pytest.mark.parametrize("family, spec", cells(SPECS), ids=str)
def test_renumbered_positions(family: str, spec: Spec) -> None:
    compare(family, spec, some(family, spec))


@pytest.mark.slow
@pytest.mark.parametrize("spec", SPECS, ids=str)
@pytest.mark.parametrize("family", FAMILIES)
def test_renumbered_positions_on_other_prompts(family: str, spec: Spec) -> None:
    compare(family, spec, others(family, spec))


LATER = [s for s in SPECS if str(s) in ("pyramiddrop", "sparsevlm", "vscan")]


@pytest.mark.parametrize("mode", [mode for mode in MODES if mode != "greedy"])
@pytest.mark.parametrize("spec", LATER, ids=str)
@pytest.mark.parametrize("family", ["llava_next", "qwen2_5_vl"])
def test_steps_count_on_behind_cuts_between_layers(family: str, spec: Spec, mode: str) -> None:
    compare(family, spec, ["batch 1" if mode == "prompt lookup" else "ragged"], mode)


@pytest.mark.parametrize("family", ["llava_next", "qwen2_5_vl"])
def test_a_later_turn_counts_on_behind_cuts_between_layers(family: str) -> None:
    model, inputs = build_model(family), cached_inputs(family, "ragged")
    with vtc.patch(model, "pyramiddrop", 0.3, positions="renumber"):
        whole = answered(model, inputs, 7)
        first = answered(model, inputs, 3)
        ids = first.sequences
        mask = torch.ones_like(ids)
        mask[:, : inputs["attention_mask"].shape[1]] = inputs["attention_mask"]
        given = {"input_ids": ids, "attention_mask": mask}
        then = answered(model, given, 4, past_key_values=first.past_key_values)
    assert torch.equal(then.sequences, whole.sequences)
    torch.testing.assert_close(
        torch.stack(then.logits), torch.stack(whole.logits[3:]), atol=1e-5, rtol=1e-4
    )


@pytest.mark.parametrize("then", ["keep", "median", "renumber"])
def test_a_cache_that_was_counted_anew_goes_on_under_another_policy(then: str) -> None:
    """Image tokens are columns 3..38 of 43; in the first turn 26 of 36 leave, so that the last of
    five tokens of the answer, read in the second, is 43 + 4 − 26 = 21."""
    model, parts = build_model("llava"), [[[3, "image", 4]], [[2, "image", 4]]]
    one, two = (build_inputs("llava", rows, seed=seed) for seed, rows in enumerate(parts))
    with vtc.patch(model, "fastv", 10, positions="renumber"):
        first = run(model, one, return_dict_in_generate=True)
    given = turns.whole("llava", one, first.sequences[:, 43:], two)
    language, seen = model.model.language_model, list[Tensor]()

    def see(module: Any, args: Any, kwargs: dict[str, Any]) -> None:
        seen.append(kwargs["position_embeddings"][0])

    hook = language.layers[-1].self_attn.register_forward_pre_hook(see, with_kwargs=True)
    with vtc.patch(model, "fastv", 10, positions=then) as handle:
        run(model, given, past_key_values=first.past_key_values, max_new_tokens=2)
    hook.remove()
    left = handle.selections[0].keep[0]
    want = torch.cat([torch.arange(21, 24), 24 + left, torch.arange(60, 65)])
    if then == "renumber":
        want = torch.arange(21, 21 + 3 + 10 + 4 + 1)
    table = language.rotary_emb(seen[0], want[None])[0]
    assert torch.equal(torch.cat(seen, 1), table)


def test_published_is_what_official_code_does_between_layers() -> None:
    facts = facts_of(adapter_of(build_model("llava_next")))
    without = dataclasses.replace(facts, has_cls=False)
    for method, seen, found in [
        (vtc.method("pyramiddrop"), facts, "renumber"),
        (vtc.method("vscan"), facts, "renumber"),
        (vtc.method("sparsevlm"), facts, "renumber"),
        (vtc.method("sparsevlm", variant="plus"), facts, "keep"),
        (vtc.method("fastv"), facts, "keep"),
        (vtc.method("todre"), facts, "keep"),
        (vtc.method("flowcut"), facts, "renumber"),
        (vtc.method("flowcut"), without, "keep"),
        (vtc.compose(("vtc_cls", 0.5), ("pyramiddrop", 0.1)), facts, "renumber"),
        (vtc.compose(("todre", 0.5), ("pyramiddrop", 0.1)), facts, "keep"),
    ]:
        assert method.published_between(seen) == found, method
    model, inputs = build_model("llava_next"), cached_inputs("llava_next", "ragged")
    logits = []
    for policy in ("keep", "renumber", "published"):
        with vtc.patch(model, "pyramiddrop", 0.3, positions=policy):
            logits.append(torch.stack(answered(model, inputs, 3).logits))
    assert torch.equal(logits[1], logits[2]) and not torch.allclose(logits[0], logits[1], atol=1e-3)


@pytest.mark.parametrize("family", QWEN)
def test_positions_counted_anew_are_those_of_stock_where_nothing_is_missing(family: str) -> None:
    """The loop of this comparison itself."""
    spec = next(spec for spec in SPECS if spec.name == "none")
    model = spec.model(family)
    for prompt in ("image first", "two images in one prompt"):
        inputs = cached_inputs(family, prompt)
        with patched(spec, family) as decision:
            run(model, inputs, max_new_tokens=1)
            given, kept = statement(model, spec, family, inputs, decision())
        short, _ = packed(given, images_of(family, spec, inputs), kept)
        seen = inputs["attention_mask"].bool()
        want = positions(model, inputs)[:, seen]
        assert torch.equal(short.positions[:, short.mask.bool()], want)
