"""On a CUDA device: the same decisions as on the CPU, and the oracle's tokens."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import vtc
from vtc.adapters.registry import adapter_of
from vtc.methods.vtc_cls import VtcCls
from vtc.runtime.images import find_images
from vtc.runtime.tower import Tower
from vtc.scorers import ClsAttention
from vtc.types import Budget, Signal

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
ROWS = [[4, None, 2, None, 5], [2, None, 9], [7]]
MODES = {
    "greedy": {},
    "beams": {"num_beams": 3},
    "static cache": {"cache_implementation": "static", "disable_compile": True},
    "no cache": {"use_cache": False},
}


def to_cuda(inputs: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {k: v.cuda() for k, v in inputs.items()}


def run(model: Any, inputs: dict[str, torch.Tensor], **options: Any) -> torch.Tensor:
    out: torch.Tensor = model.generate(
        **inputs, max_new_tokens=8, do_sample=False, suppress_tokens=[90], **options
    )
    return out


@pytest.mark.parametrize("method", ["vtc_cls", "random", "uniform"])
def test_kept_indices_are_those_of_the_cpu(llava: Any, make_inputs: Any, method: str) -> None:
    inputs = make_inputs(ROWS)
    kept = []
    for device in ("cpu", "cuda"):
        model = llava.to(device)
        with vtc.patch(model, method, 0.3) as handle:
            run(model, inputs if device == "cpu" else to_cuda(inputs))
        kept.append(handle.selections[0].keep.cpu())
    assert torch.equal(*kept)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("method", ["vtc_cls", "random", "uniform"])
def test_equals_mask_oracle(
    llava: Any, make_inputs: Any, oracle: Any, method: str, mode: str
) -> None:
    # one image per row: stock beams interleave the images of a row below transformers 5.18
    inputs, model = to_cuda(make_inputs([[4, None, 5], [2, None, 9], [7]])), llava.cuda()
    with vtc.patch(model, method, 0.33) as handle:
        got = run(model, inputs, **MODES[mode])
    assert torch.equal(got, run(model, oracle(inputs, handle.selections[0]), **MODES[mode]))


@pytest.mark.parametrize("method, keep", [("average_pool", 9), ("downsample", 0.25)])
def test_restatements_give_the_tokens_of_the_cpu(
    llava: Any, make_inputs: Any, method: str, keep: Any
) -> None:
    inputs = make_inputs(ROWS)
    found = []
    for device in ("cpu", "cuda"):
        model = llava.to(device)
        with vtc.patch(model, method, keep):
            found.append(run(model, inputs if device == "cpu" else to_cuda(inputs)).cpu())
    assert torch.equal(*found)


@torch.no_grad()
def test_loss_equals_the_oracle(llava: Any, make_inputs: Any, oracle: Any) -> None:
    inputs, model = to_cuda(make_inputs(ROWS)), llava.cuda()
    inputs["position_ids"] = (inputs["attention_mask"].cumsum(-1) - 1).clamp_min(0)
    labels = torch.full_like(inputs["input_ids"], -100)
    labels[:, -4:] = inputs["input_ids"][:, -4:]
    with vtc.patch(model, "vtc_cls", 0.3) as handle:
        got = model(**inputs, labels=labels).loss
    want = model(**oracle(inputs, handle.selections[0]), labels=labels).loss
    assert abs(got - want) < 1e-5


@torch.no_grad()
def test_probes_leave_the_tower_bit_identical(llava: Any, make_inputs: Any) -> None:
    inputs, model = to_cuda(make_inputs(ROWS)), llava.cuda().bfloat16()
    pixels, adapter = inputs["pixel_values"].bfloat16(), adapter_of(model)
    tower = Tower(adapter, VtcCls(scorer=ClsAttention(Signal("cls_row", range(6)))))
    images = find_images(adapter, inputs, inputs["input_ids"] == 90, None)
    want = model.model.vision_tower(pixels, output_hidden_states=True).hidden_states
    with tower.recording(images, inputs, Budget(1)):
        got = model.model.vision_tower(pixels, output_hidden_states=True).hidden_states
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))
    assert tower.read()["cls_row"].shape == (3, 6, 36)


def test_report_measures_on_the_device(llava: Any, make_inputs: Any) -> None:
    inputs, model = to_cuda(make_inputs(ROWS)), llava.cuda()
    with vtc.patch(model, "vtc_cls", 0.3) as handle:
        run(model, inputs)
    report = handle.report()
    assert 0 < report.encoder_ms + report.selector_ms < report.ttft_ms
    assert report.tpot_ms > 0 and report.peak_memory_bytes > 0
