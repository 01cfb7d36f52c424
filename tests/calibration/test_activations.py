"""Sink dimensions: found where they were planted, not found where there are none."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import vtc
from tests.kit.models import FAMILIES, IMAGE, build_model
from tests.kit.oracle import visual_places
from tests.kit.prompts import Inputs, build_inputs
from vtc.calibration import Activations, sink_threshold
from vtc.calibration.activations import sink_dims

WIDTH = 64
# without DeepStack, what a layer gets is what the stock model calls its hidden states
STACKED = ("qwen3_vl",)


def sample(family: str, seed: int = 0) -> Inputs:
    return build_inputs(family, [[4, "image", 5]], seed=seed)


def sinks(model: Any, *samples: Inputs) -> tuple[tuple[int, ...], Activations]:
    found = vtc.calibrate(model, samples, what="sinks", progress=False)
    assert found.sink_dims is not None and found.activations is not None
    return found.sink_dims, found.activations


def plant(model: Any, inputs: Inputs, *dims: int) -> None:
    """The first token's embedding gets huge values, falling from dimension to dimension."""
    rows = model.get_input_embeddings().weight
    with torch.no_grad():
        for i, dim in enumerate(dims):
            rows[inputs["input_ids"][0, 0], dim] = 400.0 - 50 * i


@pytest.mark.parametrize("family", FAMILIES)
def test_a_planted_dimension_is_found(family: str) -> None:
    model, inputs = build_model(family), sample(family)
    assert sinks(model, inputs)[0] == ()
    plant(model, inputs, 17)
    dims, found = sinks(model, inputs)
    assert dims == (17,)
    assert found.strongest[1:] == (17, pytest.approx(8, rel=0.01))
    assert set(found.first_dim) == {17} and 17 not in found.visual_dim
    assert all(n >= 1 for n in found.text_sinks)


def test_several_come_strongest_first() -> None:
    model, inputs = build_model("llava"), sample("llava")
    plant(model, inputs, 40, 3)
    assert sinks(model, inputs)[0] == (40, 3)


def test_huge_visual_tokens_are_told_and_are_no_sink_dimension() -> None:
    model, inputs = build_model("llava"), sample("llava")
    with torch.no_grad():
        model.model.multi_modal_projector.linear_2.bias[11] = 300.0
    dims, found = sinks(model, inputs)
    count = int((inputs["input_ids"] == IMAGE).sum())
    assert dims == ()
    assert set(found.visual_dim) == {11} and min(found.visual) > found.tau
    assert set(found.visual_sinks) == {float(count)} and max(found.text_sinks) == 0


@pytest.mark.parametrize("family", [f for f in FAMILIES if f not in STACKED])
def test_peaks_are_those_of_the_stock_hidden_states(family: str) -> None:
    model, inputs = build_model(family), sample(family)
    visual = {int(column) for g in visual_places(model, family, inputs) for _, column in g}
    with torch.no_grad():
        states = model(**inputs, output_hidden_states=True).hidden_states
    _, found = sinks(model, inputs)
    for layer, x in enumerate(states[:-1]):
        of = {"first": 0.0, "text": 0.0, "visual": 0.0}
        for at, row in enumerate(x[0].tolist()):
            rms = (sum(v * v for v in row) / len(row) + 1e-6) ** 0.5
            kind = "first" if at == 0 else "visual" if at in visual else "text"
            of[kind] = max(of[kind], *(abs(v) / rms for v in row))
        got = found.first[layer], found.text[layer], found.visual[layer]
        assert got == pytest.approx(tuple(of.values()), rel=1e-4)


def test_peaks_are_means_over_samples() -> None:
    model = build_model("llava")
    samples = sample("llava"), sample("llava", 1)
    # of two first tokens, one is huge in a dimension and one is moderate in the same
    rows = model.get_input_embeddings().weight
    with torch.no_grad():
        for inputs, value in zip(samples, (400.0, 0.1), strict=True):
            rows[inputs["input_ids"][0, 0], 17] = value
    each = [sinks(model, inputs)[1] for inputs in samples]
    _, both = sinks(model, *samples)
    assert {a.first_dim[0] for a in each} == {17}
    assert both.first[0] == pytest.approx(sum(a.first[0] for a in each) / 2, rel=1e-5)
    counts = [a.text_sinks[0] for a in each]
    assert counts[0] != counts[1] and both.text_sinks[0] == sum(counts) / 2


def peaks(depth: int, above: dict[int, dict[int, float]], width: int = 4096) -> Tensor:
    """phi of 1 everywhere, but for `above[dimension][layer]`."""
    out = torch.ones(depth, width)
    for dim, values in above.items():
        for layer, value in values.items():
            out[layer, dim] = value
    return out


def test_a_dimension_must_recur_in_half_of_the_layers_from_the_third_on() -> None:
    half, fewer = dict.fromkeys(range(2, 17), 30.0), dict.fromkeys(range(2, 16), 90.0)
    assert sink_dims(peaks(32, {7: half, 9: fewer})) == (7,)
    assert sink_dims(peaks(32, {7: dict.fromkeys((0, 1), 99.0)})) == ()


def test_at_most_three_count() -> None:
    above = {dim: dict.fromkeys(range(32), 21.0 + dim) for dim in range(5)}
    assert sink_dims(peaks(32, above)) == (4, 3, 2)
    assert sink_dims(peaks(1, above={0: {0: 50.0}})) == (0,)


def test_the_threshold_is_the_published_one_and_within_reach() -> None:
    assert [sink_threshold(width) for width in (2048, 3584, 4096, 5120)] == [20.0] * 4
    for width in (64, 256, 1536):
        one_dimension = width**0.5
        assert sink_threshold(width) == one_dimension / 2
