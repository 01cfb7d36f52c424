"""A direct forward of every family × method: logits where something is left, and the loss on text
behind the images, equal the oracle."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from tests.kit.fed import arguments, deepstack
from tests.kit.matrix import (
    SPECS,
    WIDE,
    Decision,
    Spec,
    accepted,
    by_mask,
    cached_inputs,
    cells,
    inside,
    patched,
    statement,
)
from tests.kit.models import FAMILIES, PLACEHOLDERS
from tests.kit.oracle import kept_columns, masked
from tests.kit.plain_slots import has_slots
from tests.kit.prompts import Inputs


def labels_of(inputs: Inputs) -> Tensor:
    """Text behind the last image, but for its first token: that one is predicted from padding, or
    from a visual token, which may be gone."""
    ids = inputs["input_ids"]
    visual = torch.isin(ids, torch.tensor(PLACEHOLDERS)).long()
    behind = (visual.flip(-1).cumsum(-1).flip(-1) == 0) & inputs["attention_mask"].bool()
    before = torch.nn.functional.pad(behind[:, :-1], (1, 0))
    return ids.masked_fill(~(behind & before), -100)


def oracle(
    spec: Spec, family: str, inputs: Inputs, made: Decision, labels: Tensor
) -> tuple[Any, Tensor]:
    """The output and which columns count."""
    model = spec.model(family)
    with torch.no_grad(), inside(spec, family, inputs, made):
        if by_mask(spec, family):
            assert made.first is not None
            kept = kept_columns(model, family, inputs, made.first)
            out = model(**masked(model, family, inputs, made.first), labels=labels)
        else:
            given, kept = statement(model, spec, family, inputs, made)
            with deepstack(model, given.masked(kept)):
                out = model(**arguments(given.masked(kept)), labels=labels)
    for selection in made.later.values():
        kept = kept & kept_columns(model, family, inputs, selection)
    if made.first is not None and has_slots(made.first):
        # its entries stand at other columns here
        kept = kept & ~torch.isin(inputs["input_ids"], torch.tensor(PLACEHOLDERS))
    return out, kept & inputs["attention_mask"].bool()


def compare(family: str, spec: Spec, prompts: list[str]) -> None:
    model = spec.model(family)
    for prompt in prompts:
        inputs = cached_inputs(family, prompt)
        labels = labels_of(inputs)
        with torch.no_grad(), patched(spec, family) as decision:
            got = model(**inputs, labels=labels)
            made = decision()
        want, kept = oracle(spec, family, inputs, made, labels)
        assert got.logits.shape == want.logits.shape
        close = {"atol": 2e-5, "rtol": 1e-4, "msg": lambda text, p=prompt: f"{p}: {text}"}
        torch.testing.assert_close(got.logits[kept], want.logits[kept], **close)
        torch.testing.assert_close(got.loss, want.loss, **close)
        assert kept[labels != -100].all()


@pytest.mark.parametrize("family, spec", cells(SPECS), ids=str)
def test_forward_equals_the_oracle(family: str, spec: Spec) -> None:
    compare(family, spec, [prompt for prompt in accepted(family, spec) if prompt in WIDE])


@pytest.mark.slow
@pytest.mark.parametrize("spec", SPECS, ids=str)
@pytest.mark.parametrize("family", FAMILIES)
def test_forward_equals_the_oracle_on_other_prompts(family: str, spec: Spec) -> None:
    compare(family, spec, [prompt for prompt in accepted(family, spec) if prompt not in WIDE])
