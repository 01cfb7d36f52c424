"""Methods over decoder layers where there is little text, in one's own loops, and in training."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import vtc
from tests.kit.matrix import (
    MIXED,
    SPECS,
    Decision,
    Spec,
    cached_inputs,
    cells,
    inside,
    patched,
    run,
)
from tests.kit.models import PLACEHOLDERS
from tests.kit.prompts import Inputs, Part, build_inputs

pytestmark = pytest.mark.filterwarnings("ignore:.*(do_sample|max_length).*")

ROWS = [spec for spec in SPECS if spec.over_layers]
STAY = [spec for spec in ROWS if spec.name not in ("yopo", "sink_removal")]
CLOSE = {"atol": 2e-5, "rtol": 1e-4}
LITTLE: dict[str, list[list[Part]]] = {
    "ends with its image": [[3, "image"]],
    "one of two ends with it": [[3, "image"], [2, ("image", 24, 24), 4]],
    "an image beside text": [["image"], [5]],
}
NOTHING = Decision(None, {}, None)


@pytest.mark.parametrize("rows", LITTLE)
@pytest.mark.parametrize("spec", STAY, ids=str)
def test_little_text(spec: Spec, rows: str) -> None:
    """Where every token stays the prompt may end with a visual one."""
    family = "llava"
    model, inputs = spec.model(family), build_inputs(family, LITTLE[rows])
    with patched(spec, family):
        got = run(model, inputs)
    with inside(spec, family, inputs, NOTHING):
        want = run(model, inputs)
    assert torch.equal(got, want)


def loop(model: Any, inputs: Inputs) -> Tensor:
    """Logits of two steps behind the prompt."""
    out, mask = [], inputs["attention_mask"]
    with torch.no_grad():
        made = model(**inputs, use_cache=True)
        for step in (5, 6):
            mask = torch.cat([mask, torch.ones(len(mask), 1).long()], 1)
            made = model(
                input_ids=torch.full((len(mask), 1), step),
                attention_mask=mask,
                past_key_values=made.past_key_values,
                use_cache=True,
            )
            out.append(made.logits)
    return torch.cat(out, 1)


@pytest.mark.parametrize("spec", ROWS, ids=str)
def test_a_loop_of_ones_own(spec: Spec) -> None:
    family = "internvl"
    model, inputs = spec.model(family), cached_inputs(family, MIXED)
    with patched(spec, family):
        got = loop(model, inputs)
    with inside(spec, family, inputs, NOTHING):
        want = loop(model, inputs)
    torch.testing.assert_close(got, want, **CLOSE)


def gradients(model: Any, inputs: Inputs) -> dict[str, Tensor]:
    """Of a loss on the last three tokens."""
    model.zero_grad(set_to_none=True)
    labels = inputs["input_ids"].clone()
    labels[:, :-3] = -100
    assert not torch.isin(labels, torch.tensor(PLACEHOLDERS)).any()
    model(**inputs, labels=labels).loss.backward()
    found = {name: w.grad for name, w in model.named_parameters() if w.grad is not None}
    model.zero_grad(set_to_none=True)
    return found


@pytest.mark.parametrize("family, spec", cells(ROWS, full=()), ids=str)
def test_gradients(family: str, spec: Spec) -> None:
    """Skipped rows take no part in them; what is decided is none of theirs."""
    model, inputs = spec.model(family), cached_inputs(family, MIXED)
    with patched(spec, family):
        got = gradients(model, inputs)
    with inside(spec, family, inputs, NOTHING):
        want = gradients(model, inputs)
    assert set(got) == set(want)
    for name, grad in want.items():
        # a bias of keys has none but for rounding
        error, size = (got[name] - grad).abs().max(), grad.abs().max()
        assert error < 1e-4 * size + 1e-5, name


@pytest.mark.parametrize("spec", ROWS, ids=str)
def test_an_eager_model(spec: Spec) -> None:
    """Whatever it attends with."""
    family = "qwen2_vl"
    model, inputs = spec.model(family), cached_inputs(family, MIXED)
    config = model.model.language_model.config
    before = config._attn_implementation
    with vtc.patch(model, spec.method(family), spec.keep):
        want = run(model, inputs)
        config._attn_implementation = "eager"
        try:
            got = run(model, inputs)
        finally:
            config._attn_implementation = before
    assert torch.equal(got, want)
