"""On a CUDA device, methods over decoder layers: the tokens and plans of the CPU in every mode, and
in bf16 an error of at most twice that of plain torch."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import vtc
from tests.kit.models import FAMILIES, PLACEHOLDERS, build_model
from tests.kit.prompts import build_inputs

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
SINKS: dict[str, Any] = {"dims": (3, 17), "tau": 1.5}
# keep and options
METHODS: dict[str, tuple[float | None, dict[str, Any]]] = {
    "naavit": (None, {"layers": (1, 2)}),
    "shortv": (None, {"layers": (0, 3)}),
    "ima_skip": (None, {"interval": 1}),
    "yopo": (0.5, {"heads": 1.0}),
    "var": (None, {**SINKS, "rho": 1.0, "least": 0.0}),
    "sink_removal": (None, {**SINKS, "mode": "mask"}),
}
MODES: dict[str, dict[str, Any]] = {
    "greedy": {},
    "beams": {"num_beams": 3},
    "static cache": {"cache_implementation": "static", "disable_compile": True},
}
ROWS: list[list[Any]] = [[4, ("image", 24, 48), 5], [2, ("image", 24, 24), 9], [7]]


def run(model: Any, inputs: dict[str, Any], **options: Any) -> torch.Tensor:
    given = {"max_new_tokens": 6, "do_sample": False, "suppress_tokens": PLACEHOLDERS, **options}
    out: torch.Tensor = model.generate(**inputs, **given)
    return out.cpu()


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("family", FAMILIES)
def test_tokens_and_plans_are_those_of_the_cpu(family: str, mode: str) -> None:
    model, given = build_model(family), build_inputs(family, ROWS)
    found: list[list[Any]] = []
    for device in ("cpu", "cuda"):
        model, inputs = model.to(device), {k: v.to(device) for k, v in given.items()}
        found.append([])
        for method, (keep, options) in METHODS.items():
            with vtc.patch(model, method, keep, **options) as handle:
                tokens = run(model, inputs, **MODES[mode])
            rules = [rule for plan in handle.plans for rule in plan.rules]
            seen = [
                (
                    rule.active,
                    *(None if x is None else x.tolist() for x in (rule.unread, rule.sinks)),
                )
                for rule in rules
            ]
            found[-1].append((method, tokens.tolist(), seen))
    assert found[0] == found[1]


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("family", ["llava", "qwen2_5_vl", "internvl"])
def test_bf16_is_as_near_as_plain_bf16(family: str, method: str) -> None:
    keep, options = METHODS[method]
    given = {k: v.cuda() for k, v in build_inputs(family, ROWS).items()}
    seen = given["attention_mask"].bool()

    @torch.no_grad()
    def logits(dtype: torch.dtype, attention: str) -> torch.Tensor:
        model = build_model(family).to("cuda", dtype)
        model.set_attn_implementation(attention)
        pixels = {k: v.to(dtype) if v.is_floating_point() else v for k, v in given.items()}
        with vtc.patch(model, method, keep, **options):
            out: torch.Tensor = model(**pixels).logits[seen].float()
        return out

    exact = logits(torch.float32, "eager")
    plain = (logits(torch.bfloat16, "eager") - exact).abs().max()
    ours = (logits(torch.bfloat16, "sdpa") - exact).abs().max()
    assert ours <= 2 * plain
