"""After a patch a model of any family is bit by bit what it was, also after an exception inside."""

from __future__ import annotations

from contextlib import suppress
from functools import cache
from typing import Any

import pytest
import torch

import vtc
from tests.kit.matrix import (
    SPECS,
    Spec,
    accepted,
    cached_inputs,
    cells,
    run,
)
from vtc import ops
from vtc.adapters.registry import adapter_of

pytestmark = pytest.mark.filterwarnings("ignore:.*(do_sample|max_length).*")


WHERE = ["encoder", "language model", "method"]


class Broken(Exception):
    pass


def footprint(model: Any) -> dict[str, Any]:
    """What a patch could leave traces on. The offset of M-RoPE is set by every stock call."""
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    modules = dict(model.named_modules())
    return {
        "hooks": {
            name: [len(value) for key, value in vars(module).items() if key.endswith("_hooks")]
            for name, module in modules.items()
        },
        "own": {
            name: {key: id(value) for key, value in vars(module).items() if key != "rope_deltas"}
            for name, module in modules.items()
        },
        "config": model.config.to_dict(),
        "implementations": {
            name: module.config._attn_implementation
            for name, module in modules.items()
            if hasattr(module, "config")
        },
        "generation": model.generation_config.to_dict(),
        "forward": {name: module.forward.__func__ for name, module in modules.items()},
        "classes": {name: type(module) for name, module in modules.items()},
        "attention": {name: id(function) for name, function in ALL_ATTENTION_FUNCTIONS.items()},
        "state": {
            name: (tensor.data_ptr(), tensor.double().sum().item())
            for name, tensor in model.state_dict().items()
        },
    }


def outputs(model: Any, inputs: Any) -> list[torch.Tensor]:
    with torch.no_grad():
        return [model(**inputs).logits, run(model, inputs, max_new_tokens=3)]


@cache
def settled(family: str, layers: int | None, prompt: str) -> list[torch.Tensor]:
    """Of the stock model after a first call, at which transformers installs hooks of its own."""
    model, inputs = Spec("none", layers=layers).model(family), cached_inputs(family, prompt)
    outputs(model, inputs)
    return outputs(model, inputs)


@pytest.mark.parametrize("family, spec", cells(SPECS), ids=str)
def test_a_removed_patch_leaves_nothing(family: str, spec: Spec) -> None:
    model = spec.model(family)
    prompt = accepted(family, spec)[-1]
    inputs = cached_inputs(family, prompt)
    want, before = settled(family, spec.layers, prompt), footprint(model)
    vtc.patch(model, spec.method(family), spec.keep)
    outputs(model, inputs)
    vtc.unpatch(model)
    assert footprint(model) == before
    assert all(torch.equal(a, b) for a, b in zip(outputs(model, inputs), want, strict=True))


@pytest.mark.parametrize("family, spec, where", cells(SPECS, WHERE, full=()), ids=str)
def test_an_exception_inside_leaves_nothing(
    family: str, spec: Spec, where: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = spec.model(family)
    prompt = accepted(family, spec)[-1]
    inputs = cached_inputs(family, prompt)
    want, before = settled(family, spec.layers, prompt), footprint(model)

    def broken(*args: Any, **kwargs: Any) -> Any:
        raise Broken

    with vtc.patch(model, spec.method(family), spec.keep) as handle:
        first = outputs(model, inputs)
        with monkeypatch.context() as m:
            if where == "method":
                for name in ("select", "encoder_cut", "layer_cut"):
                    m.setattr(type(handle.method), name, broken)
                m.setattr(ops, "massive_activation", broken)
            else:
                blocks = (
                    adapter_of(model).encoder().blocks
                    if where == "encoder"
                    else model.model.language_model.layers
                )
                m.setitem(vars(blocks[2].mlp), "forward", broken)
            calls = 0
            for call in (lambda: run(model, inputs), lambda: model(**inputs)):
                with suppress(Broken):
                    call()
                    calls += 1
            # what keeps everything asks nobody, and what knows its layers has been asked
            asked = spec.name not in ("none", "naavit", "shortv", "ima_skip")
            assert calls == (0 if where != "method" or asked else 2)
        again = outputs(model, inputs)
        assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert footprint(model) == before
    assert all(torch.equal(a, b) for a, b in zip(outputs(model, inputs), want, strict=True))
