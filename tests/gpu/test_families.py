"""On a CUDA device, every family and method: the decisions of the CPU, the tokens of the oracle."""

from __future__ import annotations

from contextlib import ExitStack
from typing import Any

import pytest
import torch

import vtc
from tests.kit.models import FAMILIES, PLACEHOLDERS, build_model
from tests.kit.oracle import kept_columns, masked, masked_from_layer
from tests.kit.prompts import build_inputs, prompts

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
MODES: dict[str, dict[str, Any]] = {
    "greedy": {},
    "beams": {"num_beams": 3},
    "static cache": {"cache_implementation": "static", "disable_compile": True},
    "sampled twice": {"do_sample": True, "num_return_sequences": 2},
}


def on(device: str, inputs: dict[str, Any]) -> dict[str, Any]:
    return {k: v.to(device) if isinstance(v, torch.Tensor) else v for k, v in inputs.items()}


def run(model: Any, inputs: dict[str, Any], **options: Any) -> torch.Tensor:
    torch.manual_seed(3)
    given = {"max_new_tokens": 6, "do_sample": False, "suppress_tokens": PLACEHOLDERS, **options}
    out: torch.Tensor = model.generate(**inputs, **given)
    return out


@pytest.mark.parametrize("method", ["vtc_cls", "todre", "flowcut", "average_pool", "downsample"])
@pytest.mark.parametrize("family", FAMILIES)
def test_decisions_and_tokens_are_those_of_the_cpu(family: str, method: str) -> None:
    model = build_model(family)
    for name, rows in prompts(family).items():
        inputs, found = build_inputs(family, rows), []
        for device in ("cpu", "cuda"):
            model = model.to(device)
            with vtc.patch(model, method, 0.4) as handle:
                try:
                    tokens = run(model, on(device, inputs)).cpu()
                except vtc.VtcError as error:  # a pair that is refused is refused on both
                    found.append((str(error), []))
                    continue
            found.append((tokens.tolist(), [s.mask().tolist() for s in handle.selections]))
        assert found[0] == found[1], (name, method)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("method", ["vtc_cls", "todre"])
@pytest.mark.parametrize("family", FAMILIES)
def test_equals_the_oracle(family: str, method: str, mode: str) -> None:
    model = build_model(family).cuda()
    # one image, and of InternVL one tile, per row: stock beams interleave those of a row below
    # transformers 5.18
    size = (24, 24) if family == "internvl" else (24, 48)
    inputs = build_inputs(family, [[4, ("image", *size), 5], [2, ("image", 24, 24), 9], [7]])
    with vtc.patch(model, method, 0.4) as handle:
        got = run(model, on("cuda", inputs), **MODES[mode])
    first, *later = handle.token_selections
    with ExitStack() as stack:
        for layer, selection in zip(sorted(handle._session.last.later), later, strict=True):
            keep = kept_columns(model, family, inputs, selection).cuda()
            stack.enter_context(masked_from_layer(model, layer + 1, keep))
        want = run(model, on("cuda", masked(model, family, inputs, first)), **MODES[mode])
    assert torch.equal(got, want)
