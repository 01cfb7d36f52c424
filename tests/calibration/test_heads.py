"""YOPO's ratio: against eager attention, summed key by key."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import vtc
from tests.kit.models import FAMILIES, build_model
from tests.kit.oracle import visual_places
from tests.kit.prompts import Inputs, build_inputs
from vtc.calibration.heads import head_threshold
from vtc.errors import UnsupportedModeError

ROWS = {"one image": [4, "image", 5], "two images": [2, "image", 3, ("image", 32, 32), 5]}


def stated(model: Any, family: str, inputs: Inputs) -> list[list[float]]:
    visual = {int(column) for g in visual_places(model, family, inputs) for _, column in g}
    model.set_attn_implementation("eager")
    with torch.no_grad():
        maps = model(**inputs, output_attentions=True).attentions
    found = []
    for layer in maps:
        ratios = []
        for head in layer[0].double().tolist():
            onto = [0.0, 0.0]
            for row in head:
                for at, weight in enumerate(row):
                    onto[at in visual] += weight
            ratios.append(onto[True] / onto[False])
        found.append(ratios)
    return found


@pytest.mark.parametrize("name", ROWS)
@pytest.mark.parametrize("family", FAMILIES)
def test_it_is_that_of_eager_attention(family: str, name: str) -> None:
    model, inputs = build_model(family), build_inputs(family, [ROWS[name]])
    found = vtc.calibrate(model, [inputs], what="heads", progress=False).head_ratio
    want = stated(model, family, inputs)
    torch.testing.assert_close(
        torch.tensor(found), torch.tensor(want), atol=0, rtol=2e-5, check_dtype=False
    )


def test_padding_neither_attends_nor_is_attended_to() -> None:
    model = build_model("llava")
    alone = build_inputs("llava", [[4, "image", 5]])
    padded = dict(alone)
    for name in ("input_ids", "attention_mask"):
        padded[name] = torch.nn.functional.pad(alone[name], (3, 0))
    got, want = (
        torch.tensor(vtc.calibrate(model, [x], what="heads", progress=False).head_ratio)
        for x in (padded, alone)
    )
    torch.testing.assert_close(got, want, atol=0, rtol=1e-4)


@given(
    st.lists(st.floats(0, 2, width=32), min_size=1, max_size=40),
    st.floats(0, 2, width=32),
)
def test_above_the_threshold_is_active_in_more_than_two_fifths(
    ratios: list[float], alpha: float
) -> None:
    threshold = head_threshold(torch.tensor(ratios).double()[:, None, None]).item()
    active = sum(ratio > alpha for ratio in ratios)
    assert (threshold > alpha) == (5 * active > 2 * len(ratios))


def test_every_sample_counts_once() -> None:
    model = build_model("llava")
    samples = [build_inputs("llava", [[4, "image", 5]], seed=seed) for seed in range(5)]
    every = torch.tensor(
        [vtc.calibrate(model, [x], what="heads", progress=False).head_ratio for x in samples]
    )
    found = vtc.calibrate(model, samples, what="heads", progress=False).head_ratio
    # active in three of five: the third largest
    assert torch.equal(torch.tensor(found), every.sort(0).values[2])


def test_a_sliding_window_shorter_than_the_prompt_is_refused() -> None:
    model, inputs = build_model("internvl"), build_inputs("internvl", [[4, "image", 5]])
    model.model.language_model.config.sliding_window = 8
    with pytest.raises(UnsupportedModeError, match="slides over 8, expected"):
        vtc.calibrate(model, [inputs], what="heads", progress=False)
    assert vtc.calibrate(model, [inputs], what="layers", progress=False).head_ratio is None
