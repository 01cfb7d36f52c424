"""Compiled layers: one compilation for all of a shape, the numbers of plain ones, nothing left.

The compiler's front end runs as it does on a GPU; behind it the traced code is run as it is.
"""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
from torch._dynamo.testing import CompileCounter

import vtc
from tests.kit.models import PLACEHOLDERS, build_model
from tests.kit.prompts import build_inputs, prompts
from vtc.runtime import compiling


@pytest.fixture
def counters(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """Compilations by class of module."""
    found: dict[str, Any] = {}

    @functools.cache
    def compiled(kind: Any, whole: bool = True) -> Any:
        found[kind.__name__] = counter = CompileCounter()
        return torch.compile(kind.forward, backend=counter, fullgraph=whole, dynamic=False)

    monkeypatch.setattr(compiling, "_compiled", compiled)
    torch.compiler.reset()
    return found


def generated(model: Any, inputs: dict[str, Any]) -> torch.Tensor:
    out: torch.Tensor = model.generate(
        **inputs, max_new_tokens=4, do_sample=False, suppress_tokens=PLACEHOLDERS
    )
    return out


# a prefill and a decode step; blocks that attend to windows and to whole images
LAYERS = {
    "llava": {"LlamaDecoderLayer": 2, "CLIPMLP": 1},
    "qwen2_5_vl": {"Qwen2_5_VLDecoderLayer": 2, "Qwen2_5_VLMLP": 1},
}


@pytest.mark.parametrize("family", LAYERS)
def test_all_layers_of_a_shape_share_a_compilation(family: str, counters: dict[str, Any]) -> None:
    model = build_model(family)
    inputs = build_inputs(family, prompts(family)["batch 1"])
    with vtc.patch(model, "vtc_cls", 0.4):
        want = generated(model, inputs)
    modules = [m for m in model.modules() if "forward" in vars(m)]
    indices = [layer.self_attn.layer_idx for layer in model.model.language_model.layers]
    with vtc.patch(model, "vtc_cls", 0.4, fast="eager") as handle:
        fast = handle._session.fast
        assert fast is not None
        fast.llm.compiles = fast.encoder.compiles = True
        for _ in range(4):
            got = generated(model, inputs)
        assert set(handle.report().fast.values()) == {"eager"}
        counts = {name: counter.frame_count for name, counter in counters.items()}
        generated(model, inputs)
    assert torch.equal(got, want)
    assert {name: counts[name] for name in LAYERS[family]} == LAYERS[family]
    assert {name: counter.frame_count for name, counter in counters.items()} == counts
    assert [m for m in model.modules() if "forward" in vars(m)] == modules
    assert [x.self_attn.layer_idx for x in model.model.language_model.layers] == indices
