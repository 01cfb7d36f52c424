"""What is refused, and that nothing else is."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import vtc
from tests.kit.matrix import (
    FULL,
    REFUSED,
    SPECS,
    WIDE,
    Refusal,
    Spec,
    accepted,
    cached_inputs,
    cells,
    model_of,
    patched,
    run,
    specs_of,
)
from tests.kit.prompts import Part, build_inputs
from vtc.errors import InputError, OptionError

pytestmark = pytest.mark.filterwarnings("ignore:.*(do_sample|max_length).*")

# (family, method, options, keep, rows): refused for what is asked of it, not for its kind
ASKED: dict[str, tuple[str, str, dict[str, Any], Any, list[list[Part]], Refusal]] = {
    f"more frames than tokens, {family}": (
        family,
        "downsample",
        {},
        1,
        [[3, "video", 4]],
        (InputError, r"got a video of \d frames and 1 tokens to keep of it"),
    )
    for family in ("llava_onevision", "qwen2_vl", "qwen2_5_vl", "qwen3_vl")
} | {
    f"a prompt that ends with its image, {family}": (
        family,
        "flowcut",
        {"llm_cut": "on"},
        4,
        [[3, "image"]],
        (InputError, "expected text after the image, got a prompt that ends with it"),
    )
    for family in ("llava", "llava_siglip")
}
ASKED["fewer tokens than crops"] = (
    *("llava_next", "flowcut", {"llm_cut": "off"}, 1, [[3, "image", 4]]),
    (OptionError, r"keep=1 tokens were to be shared by \d crops or frames"),
)


def fails(family: str, spec: Spec, inputs: Any, refusal: Refusal) -> None:
    """In both ways of calling; afterwards the model is stock again."""
    model, (error, message) = spec.model(family), refusal
    with torch.no_grad():
        before = model(**inputs).logits
    with patched(spec, family) as decision:
        for call in (lambda: run(model, inputs), lambda: model(**inputs)):
            with torch.no_grad(), pytest.raises(error, match=message):
                call()
            assert decision().first is None
    with torch.no_grad():
        assert torch.equal(model(**inputs).logits, before)


@pytest.mark.parametrize("family, method, prompt", REFUSED)
def test_what_cannot_be_right_is_refused(family: str, method: str, prompt: str) -> None:
    for spec in specs_of(method):
        fails(family, spec, cached_inputs(family, prompt), REFUSED[family, method, prompt])


# in the others every prompt is compared in test_matrix_generate.py, and these in all families in
# test_matrix_forward.py
@pytest.mark.parametrize(
    "family, spec", [cell for cell in cells(SPECS) if cell.values[0] not in FULL], ids=str
)
def test_nothing_else_is_refused(family: str, spec: Spec) -> None:
    model = spec.model(family)
    for prompt in [p for p in accepted(family, spec) if p not in WIDE]:
        inputs = cached_inputs(family, prompt)
        with torch.no_grad(), patched(spec, family) as decision:
            run(model, inputs, max_new_tokens=1)
            assert decision().report.visual_tokens


@pytest.mark.parametrize("case", ASKED)
def test_what_was_asked_for_cannot_be_had(case: str) -> None:
    family, name, options, keep, rows, (error, message) = ASKED[case]
    model, inputs = model_of(family), build_inputs(family, rows)
    with vtc.patch(model, name, keep, **options):
        for call in (lambda: run(model, inputs), lambda: model(**inputs)):
            with torch.no_grad(), pytest.raises(error, match=message):
                call()
    more = [[*row, 2] for row in rows] if "ends" in case else rows
    with vtc.patch(model, name, 12, **options) as handle:
        run(model, build_inputs(family, more))
    assert handle.selections
