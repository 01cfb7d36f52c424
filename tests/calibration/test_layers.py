"""The LC score: against layers written out, in which visual rows stay what they are."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import vtc
from tests.kit.models import FAMILIES, PAD, WITH_VIDEO, build_model
from tests.kit.plain_methods import prompt_of
from tests.kit.plain_rows import Rule, restated
from tests.kit.prompts import Inputs, Part, build_inputs

PROMPTS: dict[str, list[Part]] = {
    "one image": [4, "image", 5],
    "image first": ["image", 3],
    "two images": [4, "image", 2, ("image", 32, 32), 5],
}
CASES = [(family, name) for family in FAMILIES for name in PROMPTS]


def last(model: Any, inputs: Inputs) -> Tensor:
    with torch.no_grad():
        return model(**inputs).logits[0, -1].double().log_softmax(-1)


def stated(model: Any, family: str, inputs: Inputs) -> list[float]:
    """KL(frozen ‖ normal), summed in a loop over the vocabulary."""
    normal = last(model, inputs).tolist()
    found = []
    for layer in range(len(model.model.language_model.layers)):
        rules = {layer: Rule(attention=False, ffn=False)}
        with restated(model, prompt_of(model, family, inputs), rules):
            frozen = last(model, inputs)
        pairs = zip(frozen.exp().tolist(), frozen.tolist(), normal, strict=True)
        found.append(sum(p * (log_p - log_q) for p, log_p, log_q in pairs))
    return found


def measured(model: Any, *samples: Inputs) -> tuple[float, ...]:
    found = vtc.calibrate(model, samples, what="layers", progress=False).layer_contribution
    assert found is not None
    return found


@pytest.mark.parametrize(("family", "name"), CASES)
def test_it_is_that_of_layers_written_out(family: str, name: str) -> None:
    model = build_model(family)
    inputs = build_inputs(family, [PROMPTS[name]])
    want = stated(model, family, inputs)
    # two logits that are a rounding error apart move a divergence of KL by about its root
    torch.testing.assert_close(measured(model, inputs), tuple(want), atol=1e-7, rtol=1e-3)
    assert max(want) > 1e-4


@pytest.mark.parametrize("family", WITH_VIDEO)
def test_frames_of_a_video_are_frozen_like_images(family: str) -> None:
    model = build_model(family)
    inputs = build_inputs(family, [[3, "video", 4]])
    want = tuple(stated(model, family, inputs))
    torch.testing.assert_close(measured(model, inputs), want, atol=1e-7, rtol=1e-3)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_last_layer_contributes_nothing(family: str) -> None:
    found = measured(build_model(family), build_inputs(family, [[4, "image", 5]]))
    assert found[-1] == 0 and min(found[:-1]) > 0


def test_a_layer_that_does_nothing_contributes_nothing() -> None:
    model = build_model("llava")
    layer = model.model.language_model.layers[1]
    with torch.no_grad():
        layer.self_attn.o_proj.weight.zero_()
        layer.mlp.down_proj.weight.zero_()
    found = measured(model, build_inputs("llava", [[4, "image", 5]]))
    assert found[1] == 0 and found[0] > 0 and found[2] > 0


def test_scores_are_means_with_standard_errors() -> None:
    model = build_model("llava")
    samples = [build_inputs("llava", [[4, "image", 5]], seed=seed) for seed in range(3)]
    each = torch.tensor([measured(model, sample) for sample in samples], dtype=torch.float64)
    found = vtc.calibrate(model, samples, what="layers", progress=False)
    torch.testing.assert_close(
        torch.tensor(found.layer_contribution), each.mean(0).float(), atol=0, rtol=1e-5
    )
    spread = ((each - each.mean(0)).square().sum(0) / 2 / 3).sqrt()
    torch.testing.assert_close(
        torch.tensor(found.contribution_error), spread.float(), atol=0, rtol=1e-4
    )
    assert found.samples == 3
    alone = vtc.calibrate(model, samples[:1], what="layers", progress=False)
    assert alone.contribution_error is None


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_changes_nothing(side: str) -> None:
    model, inputs = build_model("llava"), build_inputs("llava", [[4, "image", 5]])
    ids, mask = inputs["input_ids"], inputs["attention_mask"]
    pads = torch.full((1, 3), PAD)
    first = side == "left"
    padded = inputs | {
        "input_ids": torch.cat([pads, ids] if first else [ids, pads], 1),
        "attention_mask": torch.cat([pads, mask] if first else [mask, pads], 1),
    }
    torch.testing.assert_close(
        measured(model, padded), measured(model, inputs), atol=1e-7, rtol=1e-3
    )
