"""`positions="renumber"` of every family × method: the stock language model on the short sequence
alone, its positions counted anew by a loop."""

from __future__ import annotations

from contextlib import ExitStack

import pytest
import torch
from torch import Tensor

from tests.kit.fed import packed
from tests.kit.matrix import (
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
from tests.kit.models import FAMILIES, QWEN
from tests.kit.oracle import groups, kept_columns, masked_from_layer, positions
from tests.kit.prompts import Inputs

pytestmark = pytest.mark.filterwarnings("ignore:.*(do_sample|max_length).*")


def images_of(family: str, spec: Spec, inputs: Inputs) -> Tensor:
    """Which image or video each column belongs to, −1 for text: `[B, S]`."""
    out = torch.full_like(inputs["input_ids"], -1)
    for g, group in enumerate(groups(spec.model(family), family, inputs)):
        out[tuple(group.tokens.T)] = g
    return out


def compare(family: str, spec: Spec, prompts: list[str]) -> None:
    model = spec.model(family)
    for prompt in prompts:
        inputs = cached_inputs(family, prompt)
        with patched(spec, family, positions="renumber") as decision:
            got = run(model, inputs)
            made = decision()
        if spec.over_layers or (made.first is not None and made.first.is_identity):
            # nothing is dropped before the LLM: there is nothing to renumber
            assert torch.equal(got, want(spec, family, inputs, made, "greedy"))
            continue
        given, kept = statement(model, spec, family, inputs, made)
        short, columns = packed(given, images_of(family, spec, inputs), kept)
        with ExitStack() as stack:
            for layer, selection in made.later.items():
                left = kept_columns(model, family, inputs, selection)
                seen = torch.ones_like(short.mask, dtype=torch.bool)
                for row, at in enumerate(columns):
                    seen[row, len(seen[row]) - len(at) :] = left[row, at]
                stack.enter_context(masked_from_layer(model, layer + 1, seen))
            assert torch.equal(run_fed(model, short), got), prompt


@pytest.mark.parametrize("family, spec", cells(SPECS), ids=str)
def test_renumbered_positions(family: str, spec: Spec) -> None:
    compare(family, spec, some(family, spec))


@pytest.mark.slow
@pytest.mark.parametrize("spec", SPECS, ids=str)
@pytest.mark.parametrize("family", FAMILIES)
def test_renumbered_positions_on_other_prompts(family: str, spec: Spec) -> None:
    compare(family, spec, others(family, spec))


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
