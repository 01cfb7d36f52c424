"""The fast path as CUDA graphs: the answers of the plain path, shared captures, bounded memory."""

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

FAMILIES = ("llava", "llava_next", "qwen2_vl", "qwen2_5_vl", "internvl")
METHODS: dict[str, tuple[Any, dict[str, Any]]] = {
    "vtc_cls": (0.3, {}),
    "todre": (0.3, {"stage2": False}),
    "random": (0.3, {}),
    "average_pool": (0.3, {}),
    "none": (1.0, {}),
}


@pytest.fixture(scope="module", params=FAMILIES)
def family(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def model(family: str) -> Any:
    return build_model(family).cuda()


def on_cuda(inputs: dict[str, Any]) -> dict[str, Any]:
    return {name: x.cuda() for name, x in inputs.items()}


def generated(model: Any, inputs: dict[str, Any], **more: Any) -> Any:
    return answered(model, inputs, 6, **more)


def agree(
    model: Any, inputs: dict[str, Any], method: str, keep: Any, fast: Any, **more: Any
) -> Any:
    with vtc.patch(model, method, keep, **more):
        want = generated(model, inputs)
        with torch.no_grad():
            want_logits = model(**inputs, logits_to_keep=1).logits
    with vtc.patch(model, method, keep, fast=fast, **more) as handle:
        for _ in range(3):
            got = generated(model, inputs)
            with torch.no_grad():
                got_logits = model(**inputs, logits_to_keep=1).logits
        report = handle.report()
    assert torch.equal(got.sequences, want.sequences)
    torch.testing.assert_close(got_logits, want_logits, atol=1e-4, rtol=1e-3)
    for a, b in zip(got.logits, want.logits, strict=True):
        torch.testing.assert_close(a, b, atol=1e-4, rtol=1e-3)
    return report


@pytest.mark.parametrize("kind", ["batch 1", "ragged"])
@pytest.mark.parametrize("method", METHODS)
def test_graphs_equal_the_plain_path(model: Any, family: str, method: str, kind: str) -> None:
    keep, options = METHODS[method]
    inputs = on_cuda(build_inputs(family, prompts(family)[kind]))
    report = agree(model, inputs, method, keep, True, **options)
    parts = {part: said for part, said in report.fast.items() if part != "decode"}
    assert (
        parts.pop("selection") == "cuda"
        or method in ("random", "average_pool")
        or (method == "todre" and "draws numbers" in report.fast["selection"])
    )
    assert set(parts.values()) == {"cuda"}
    assert report.graph_bytes > 0


@pytest.mark.parametrize("method", ["todre", "flowcut"])
def test_what_depends_on_numbers_stays_plain(model: Any, family: str, method: str) -> None:
    inputs = on_cuda(build_inputs(family, prompts(family)["ragged"]))
    report = agree(model, inputs, method, 0.4, True)
    if method == "todre":
        assert report.fast["encoder"] == "cuda"
        assert report.fast["prefill"] == "cuda" and "decides" in report.fast["decode"]
    else:
        assert report.fast["encoder"] == "cuda"


@pytest.mark.parametrize("family", ["llava", "qwen2_5_vl"], indirect=True)
def test_compiled_layers_equal_the_plain_path(model: Any, family: str) -> None:
    inputs = on_cuda(build_inputs(family, prompts(family)["batch 1"]))
    report = agree(model, inputs, "vtc_cls", 0.3, "compile")
    assert report.fast["encoder"] == report.fast["prefill"] == "cuda"


def test_ten_prompts_of_a_bucket_are_captured_once() -> None:
    model = build_model("llava_next").cuda()
    sizes = [(24, 12), (12, 24), (24, 24), (12, 36), (20, 12), (24, 20), (12, 12), (18, 24), (6, 6)]
    with vtc.patch(model, "vtc_cls", 12, fast=True) as handle:
        graphs = handle._session.fast.graphs  # type: ignore[union-attr]
        captures = []
        for i, size in enumerate(sizes * 3):
            rows = [[3 + i % 4, ("image", *size), 4]]
            generated(model, on_cuda(build_inputs("llava_next", rows, seed=i)))
            captures.append(graphs.captures)
        llm = [key for key in graphs._held if key[0] == "language model"]  # type: ignore[index]
    assert len(llm) == 2  # a prefill and a decode step
    # sizes are captured when they come again
    assert captures[len(sizes) - 1] == 2 and captures[2 * len(sizes) - 1] == captures[-1]


def test_a_thousand_generates_take_no_more_memory() -> None:
    model = build_model("llava").cuda()
    inputs = [
        on_cuda(build_inputs("llava", [[2 + i, "image", 3]] * (1 + i % 2), seed=i))
        for i in range(10)
    ]
    with vtc.patch(model, "vtc_cls", 6, fast=True) as handle:
        memory = []
        for i in range(1000):
            given = inputs[i % len(inputs)]
            out = model.generate(**given, max_new_tokens=2, do_sample=False)
            if i % 100 == 99:
                torch.cuda.synchronize()
                memory.append((torch.cuda.memory_allocated(), torch.cuda.memory_reserved()))
        assert handle.report().graph_bytes > 0
        del out
    assert len(set(memory)) == 1


def test_graph_memory_comes_back() -> None:
    model = build_model("llava").cuda()
    inputs = on_cuda(build_inputs("llava", prompts("llava")["ragged"]))
    generated(model, inputs)  # what libraries take once
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    with vtc.patch(model, "vtc_cls", 6, fast=True):
        generated(model, inputs)
        assert torch.cuda.memory_allocated() > before
    torch.cuda.synchronize()
    assert torch.cuda.memory_allocated() <= before + 2**20
