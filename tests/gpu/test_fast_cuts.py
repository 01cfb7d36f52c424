"""Prefills with cuts between decoder layers as one graph: the answers, tokens and caches of the
plain path."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import vtc
from tests.kit.answers import answered
from tests.kit.models import build_model
from tests.kit.prompts import build_inputs, prompts

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

# what decides: sizes alone behind one layer or several, or what is seen; then all goes or none
METHODS: dict[str, tuple[str, dict[str, Any]]] = {
    "todre": ("todre", {}),
    "todre drops all": ("todre", {"tau": 2.0}),
    "todre drops none": ("todre", {"tau": 0.0}),
    "flowcut": ("flowcut", {"llm_cut": "on"}),
    "fastv": ("fastv", {}),
    "pyramiddrop": ("pyramiddrop", {}),
}


@pytest.mark.parametrize("family", ["llava", "llava_next", "qwen2_5_vl", "internvl"])
def test_graphs_cut_as_the_plain_path(family: str) -> None:
    model, given = build_model(family).cuda(), prompts(family)
    for name, (method, options) in METHODS.items():
        for batch in ("batch 1", "ragged"):
            inputs = {k: x.cuda() for k, x in build_inputs(family, given[batch]).items()}
            _agrees(model, inputs, method, options, f"{name}, {batch}")


def _agrees(
    model: Any, inputs: dict[str, Any], method: str, options: dict[str, Any], case: str
) -> None:
    with vtc.patch(model, method, 0.3, **options) as handle:
        want = _generated(model, inputs)
        kept = [s.mask() for s in handle.token_selections]
    with vtc.patch(model, method, 0.3, fast=True, **options) as handle:
        for _ in range(3):
            got = _generated(model, inputs)
        report = handle.report()
        assert report.fast["prefill"] == "cuda", case
        assert report.selector_ms is not None and report.selector_ms > 0, case
        found = [s.mask() for s in handle.token_selections]
    assert torch.equal(got.sequences, want.sequences), case
    for a, b in zip(got.logits, want.logits, strict=True):
        torch.testing.assert_close(a, b, atol=2e-4, rtol=1e-3)
    assert len(found) == len(kept) and all(map(torch.equal, found, kept)), case


def _generated(model: Any, inputs: dict[str, Any]) -> Any:
    return answered(model, inputs, 6)
