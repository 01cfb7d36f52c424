"""Every family × method × way of generating equals the oracle of what the method declares."""

from __future__ import annotations

import pytest
import torch

import vtc
from tests.kit.matrix import (
    FAMILIES,
    MODES,
    SPECS,
    STATEMENTS,
    Spec,
    accepted,
    cached_inputs,
    cells,
    decided,
    patched,
    run,
    some,
    specs_of,
    stock,
    want,
)
from tests.kit.models import QWEN
from tests.kit.plain_methods import ROWS

pytestmark = pytest.mark.filterwarnings("ignore:.*(do_sample|max_length).*")


def compare(family: str, spec: Spec, mode: str, prompts: list[str]) -> None:
    model = spec.model(family)
    for prompt in prompts:
        inputs = cached_inputs(family, prompt)
        if mode == "greedy":
            got, made = decided(family, spec, prompt)
        else:
            with patched(spec, family) as decision:
                got = run(model, inputs, **MODES[mode])
                made = decision()
        assert torch.equal(got, want(spec, family, inputs, made, mode)), prompt


# what these merge is read from their selections
MERGING = ("vscan", "visionzip", "prumerge", "prumerge_plus")


def batch_of(mode: str) -> int | None:
    return 1 if mode == "prompt lookup" else None


@pytest.mark.parametrize("family, spec, mode", cells(SPECS, list(MODES)), ids=str)
def test_generate_equals_the_oracle(family: str, spec: Spec, mode: str) -> None:
    found = accepted if mode == "greedy" else some
    compare(family, spec, mode, found(family, spec, batch=batch_of(mode)))


@pytest.mark.slow
@pytest.mark.parametrize("mode", [mode for mode in MODES if mode != "greedy"])
@pytest.mark.parametrize("spec", SPECS, ids=str)
@pytest.mark.parametrize("family", FAMILIES)
def test_generate_equals_the_oracle_on_other_prompts(family: str, spec: Spec, mode: str) -> None:
    rows = {"batch": batch_of(mode)}
    done = some(family, spec, **rows)
    compare(family, spec, mode, [p for p in accepted(family, spec, **rows) if p not in done])


def test_every_restatement_is_stated() -> None:
    stated = {
        name
        for name in vtc.methods()
        if vtc.method(name).exactness == "restatement"
        # what these merge is read from their selections
        and vtc.method(name).site not in ("encoder", "llm_layer")
        and name not in MERGING
    }
    assert stated <= set(STATEMENTS) | set(ROWS)
    assert set(STATEMENTS) | set(ROWS) <= set(vtc.methods())


@pytest.mark.parametrize("family", FAMILIES)
def test_stage_2_of_todre_acts_in_some_rows_and_not_in_others(family: str) -> None:
    """Else its comparisons would show nothing."""
    for spec in specs_of("todre"):
        fired = []
        for prompt in ("ragged", "mixed: two images, one image, text only"):
            with patched(spec, family) as decision:
                run(spec.model(family), cached_inputs(family, prompt), max_new_tokens=2)
                made = decision()
            (last,) = made.later.values()
            fired += (last.slots == 0).tolist()
        assert any(fired), spec
        assert not all(fired) or dict(spec.options)["tau"] == 1.0, spec


@pytest.mark.parametrize("family, spec", cells(SPECS), ids=str)
def test_what_is_dropped_matters(family: str, spec: Spec) -> None:
    """Else equality would show nothing."""
    # evs leaves images whole, and only these families say which tokens are frames of one video
    if spec.name == "none" or (spec.name == "evs" and family not in ("llava_onevision", *QWEN)):
        return
    model = spec.model(family)
    for prompt in accepted(family, spec):
        inputs = cached_inputs(family, prompt)
        if spec.over_layers:
            # a hundred times the tolerance; tokens may stay the same
            with torch.no_grad(), patched(spec, family):
                got = model(**inputs).logits[:, -1]
            moved = (got - stock(family, spec.layers, prompt)[1].logits[:, -1]).abs().amax(-1)
            assert (moved > 2e-3).any()
            return
        (added, _), before = decided(family, spec, prompt), inputs["input_ids"].shape[1]
        if not torch.equal(added, stock(family, spec.layers, prompt)[0].sequences[:, before:]):
            return
    raise AssertionError("every answer is that of the whole picture")
