"""Patched models on kernels: the tokens, and the decisions, of plain torch."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import vtc
from tests.kit.models import PLACEHOLDERS, build_model
from tests.kit.prompts import build_inputs, prompts
from vtc.errors import OptionError

# which operations of a call have a kernel
RAN: dict[str, tuple[Any, dict[str, Any], set[str]]] = {
    "vtc_cls": (0.3, {}, {"attention_rows", "group_topk", "packed_index", "compact"}),
    "todre": (0.3, {"stage2": False}, {"greedy_diverse", "group_topk", "compact"}),
    "average_pool": (0.3, {}, {"group_merge", "compact"}),
    "flowcut": (0.3, {"llm_cut": "off"}, {"compact"}),
}


def answered(model: Any, inputs: dict[str, Any], method: str, kernels: str, fast: Any) -> Any:
    keep, options, _ = RAN[method]
    with vtc.patch(model, method, keep, kernels=kernels, fast=fast, **options) as handle:
        for _ in range(2 if fast else 1):
            out = model.generate(
                **inputs, max_new_tokens=3, do_sample=False, suppress_tokens=PLACEHOLDERS
            )
        return out, handle.token_selections, handle.report().kernels


@pytest.mark.parametrize("fast", [False, "eager"])
@pytest.mark.parametrize("method", RAN)
def test_kernels_change_nothing(method: str, fast: Any) -> None:
    model = build_model("llava")
    inputs = build_inputs("llava", prompts("llava")["ragged"])
    want, plain, torch_ran = answered(model, inputs, method, "torch", fast)
    got, kept, ran = answered(model, inputs, method, "triton", fast)
    assert torch.equal(got, want)
    for a, b in zip(kept, plain, strict=True):
        assert torch.equal(a.keep, b.keep) and torch.equal(a.valid, b.valid)
    assert set(torch_ran.values()) == {"torch"} and set(ran.values()) == {"triton"}
    assert RAN[method][2] <= set(ran)


def test_a_shape_without_a_kernel_is_refused_where_one_was_asked_for() -> None:
    model = build_model("llava").double()
    inputs = build_inputs("llava", prompts("llava")["ragged"])
    inputs = {name: x.double() if x.is_floating_point() else x for name, x in inputs.items()}
    with (
        vtc.patch(model, "vtc_cls", 0.3, kernels="triton"),
        pytest.raises(OptionError, match="has no kernel for"),
    ):
        model.generate(**inputs, max_new_tokens=3)
