"""Masks and positions as flash attention takes them: gaps in position ids are no borders."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

import vtc
from tests.kit.flash import like_flash, use_like_flash
from tests.kit.models import PLACEHOLDERS, build_model
from tests.kit.oracle import masked
from tests.kit.prompts import PROMPTS, build_inputs


def run(model: Any, inputs: dict[str, Any], **options: Any) -> torch.Tensor:
    given = {"max_new_tokens": 6, "do_sample": False, "suppress_tokens": PLACEHOLDERS, **options}
    return model.generate(**inputs, **given)


@pytest.mark.parametrize("prompt", ["batch 1", "ragged"])
@pytest.mark.parametrize("family", ["llava", "qwen2_5_vl"])
@pytest.mark.parametrize("options", [{}, {"num_beams": 2}, {"prompt_lookup_num_tokens": 2}])
def test_generate_equals_the_mask_oracle_on_sdpa(
    family: str, prompt: str, options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    if prompt == "ragged" and "prompt_lookup_num_tokens" in options:
        prompt = "image first"  # stock speculates for one row alone
    rows = PROMPTS[prompt][: 1 if "prompt_lookup_num_tokens" in options else None]
    flash, stock, inputs = build_model(family), build_model(family), build_inputs(family, rows)
    use_like_flash(flash, monkeypatch)
    hooks = [len(m._forward_pre_hooks) for m in flash.modules()]
    with vtc.patch(flash, "uniform", 0.4) as handle:
        got = run(flash, inputs, **options)
    assert [len(m._forward_pre_hooks) for m in flash.modules()] == hooks
    options.pop("prompt_lookup_num_tokens", None)
    assert torch.equal(got, run(stock, masked(stock, family, inputs, handle.selections), **options))


@torch.no_grad()
@pytest.mark.parametrize("family", ["llava", "qwen2_5_vl"])
def test_forward_equals_the_mask_oracle_on_sdpa(
    family: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    flash, stock = build_model(family), build_model(family)
    inputs = build_inputs(family, PROMPTS["batch 1"])
    use_like_flash(flash, monkeypatch)
    with vtc.patch(flash, "uniform", 0.4) as handle:
        got = flash(**inputs).logits[:, -1]
    want = stock(**masked(stock, family, inputs, handle.selections)).logits[:, -1]
    torch.testing.assert_close(got, want, atol=1e-4, rtol=1e-4)


def test_nothing_is_hidden_from_flash_in_a_packed_encoder(monkeypatch: pytest.MonkeyPatch) -> None:
    model, inputs = build_model("qwen2_5_vl"), build_inputs("qwen2_5_vl", PROMPTS["batch 1"])
    monkeypatch.setitem(ALL_ATTENTION_FUNCTIONS, "like_flash", like_flash)
    model.model.visual.config._attn_implementation = "like_flash"
    found = []
    for fast in (False, "eager"):
        with vtc.patch(model, "flowcut", 0.4, fast=fast) as handle:
            found.append(run(model, inputs))
    assert "takes no masks" in handle.report().fast["encoder"]
    assert torch.equal(*found)


SINKS: dict[str, Any] = {"dims": (3, 17), "tau": 1.5, "rho": 1.0, "least": 0.0}
OVER_LAYERS = {
    "naavit": vtc.method("naavit", layers=(1, 2)),
    "shortv": vtc.method("shortv", layers=(0, 3)),
    "var": vtc.method("var", **SINKS),
    "naavit and var": vtc.compose(vtc.method("naavit", layers=(1, 2)), vtc.method("var", **SINKS)),
}


@pytest.mark.parametrize("prompt", ["batch 1", "ragged"])
@pytest.mark.parametrize("name", OVER_LAYERS)
def test_methods_over_layers_equal_those_on_sdpa(
    name: str, prompt: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    flash, stock = build_model("llava"), build_model("llava")
    inputs = build_inputs("llava", PROMPTS[prompt])
    use_like_flash(flash, monkeypatch)
    found = []
    for model in (flash, stock):
        with vtc.patch(model, OVER_LAYERS[name]):
            found.append(run(model, inputs, return_dict_in_generate=True, output_logits=True))
    assert torch.equal(found[0].sequences, found[1].sequences)
    got, want = (torch.stack(out.logits) for out in found)
    torch.testing.assert_close(got, want, atol=1e-4, rtol=1e-4)
