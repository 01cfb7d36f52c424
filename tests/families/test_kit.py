"""The test kit itself: stock models run on its prompts, and its oracles mean what they say."""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest
import torch

from tests.kit.models import FAMILIES, IMAGE, PLACEHOLDERS, QWEN, VIDEO, WITH_VIDEO, build_model
from tests.kit.oracle import (
    groups,
    kept_columns,
    masked,
    masked_from_layer,
    positions,
    rows_expanded_by_hand,
    select,
    visual_places,
)
from tests.kit.prompts import PROMPTS, VIDEO_PROMPTS, alone, build_inputs, prompts

pytestmark = pytest.mark.filterwarnings("ignore:.*(do_sample|max_length).*")

MIXED = "mixed: two images, one image, text only"
CASES = [(family, name) for family in FAMILIES for name in prompts(family)]
MODES: dict[str, dict[str, Any]] = {
    "greedy": {},
    "beams": {"num_beams": 3},
    "static cache": {"cache_implementation": "static"},
    "no cache": {"use_cache": False},
}

model_of = cache(build_model)


def rows_for(family: str) -> list[Any]:
    """Every kind of row that the family can read in one batch."""
    return [*PROMPTS[MIXED], *(VIDEO_PROMPTS["video"] if family in WITH_VIDEO else [])]


def run(model: Any, inputs: dict[str, Any], **options: Any) -> torch.Tensor:
    given = {"max_new_tokens": 6, "do_sample": False, "suppress_tokens": PLACEHOLDERS, **options}
    return model.generate(**inputs, **given)[:, inputs["input_ids"].shape[1] :]


@pytest.mark.parametrize("family, prompt", CASES)
def test_a_batch_row_equals_the_row_alone(family: str, prompt: str) -> None:
    model, inputs = model_of(family), build_inputs(family, prompts(family)[prompt])
    whole = run(model, inputs)
    for row, want in enumerate(whole):
        assert torch.equal(run(model, alone(family, inputs, row))[0], want)


@pytest.mark.parametrize("family", FAMILIES)
def test_beams_of_a_batch_row_equal_those_of_the_row_alone(family: str) -> None:
    model, inputs = model_of(family), build_inputs(family, rows_for(family))
    with rows_expanded_by_hand(model, family):
        for row, want in enumerate(run(model, inputs, num_beams=2)):
            assert torch.equal(run(model, alone(family, inputs, row), num_beams=2)[0], want)


@pytest.mark.parametrize("family", FAMILIES)
def test_answers_depend_on_the_picture(family: str) -> None:
    model, inputs = model_of(family), build_inputs(family, rows_for(family))
    answers = run(model, inputs)
    assert all(len(set(answer)) > 1 for answer in answers[:2].tolist())
    other = {k: -v if k.startswith("pixel") else v for k, v in inputs.items()}
    assert not torch.equal(run(model, other), answers)
    with torch.no_grad():
        moved = model(**other).logits[:, -1] - model(**inputs).logits[:, -1]
    assert (moved.abs().amax(-1) > 0.05).tolist() == [True, True, False, True][: len(answers)]


@pytest.mark.parametrize("family, prompt", CASES)
def test_groups_cover_the_placeholders(family: str, prompt: str) -> None:
    model, inputs = model_of(family), build_inputs(family, prompts(family)[prompt])
    found = torch.zeros_like(inputs["input_ids"])
    for group in groups(model, family, inputs):
        found[tuple(group.tokens.T)] += 1
        covered = [i for newline in group.newlines for i in newline.members.tolist()]
        assert sorted(set(covered)) == covered
        assert not covered or covered[-1] == len(group.tokens) - 1
        for newline in group.newlines:
            # it stands right behind the last token of its row
            before = group.tokens[newline.members[-1]] + torch.tensor([0, 1])
            assert torch.equal(newline.place, before)
            found[tuple(newline.place)] += 1
    want = (inputs["input_ids"] == IMAGE) | (inputs["input_ids"] == VIDEO)
    assert torch.equal(found, want.long())


def test_newlines_of_one_row() -> None:
    model = model_of("llava_next")
    inputs = build_inputs("llava_next", [["image", 3]])
    (group,) = groups(model, "llava_next", inputs)
    # 3×3 tokens of the whole image, then rows of 6 from two crops
    assert [line.members.tolist() for line in group.newlines] == [
        list(range(9 + 6 * row, 15 + 6 * row)) for row in range(3)
    ]
    selection = select(model, "llava_next", inputs, 1.0)
    selection.valid[0, 15:21] = False
    kept = kept_columns(model, "llava_next", inputs, selection)[0].nonzero().flatten()
    assert sorted(set(range(33)) - set(kept.tolist())) == list(range(16, 23))


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("mode", MODES)
def test_mask_oracle(family: str, mode: str) -> None:
    model, inputs = model_of(family), build_inputs(family, rows_for(family))
    options = MODES[mode]
    with rows_expanded_by_hand(model, family):
        whole = run(model, inputs, **options)
        everything = masked(model, family, inputs, select(model, family, inputs, 1.0))
        some = masked(model, family, inputs, select(model, family, inputs, 0.3))
        assert torch.equal(run(model, everything, **options), whole)
        changed = (run(model, some, **options) != whole).any(-1).tolist()
    assert any(changed) and not changed[2]
    assert everything["position_ids"].shape[:-2] == ((4,) if family in QWEN else ())


@pytest.mark.parametrize("family", FAMILIES)
def test_forward_with_the_positions_of_generate(family: str) -> None:
    model, inputs = model_of(family), build_inputs(family, rows_for(family))
    seen = inputs["attention_mask"].bool()
    given = inputs | {"position_ids": positions(model, inputs)}
    with torch.no_grad():
        step = run(model, inputs, max_new_tokens=1)[:, 0]
        logits = model(**given).logits
    logits[..., PLACEHOLDERS] = -torch.inf
    assert torch.equal(logits[:, -1].argmax(-1), step)
    if family in QWEN:
        with torch.no_grad():
            own = model(**inputs).logits
        own[..., PLACEHOLDERS] = -torch.inf
        torch.testing.assert_close(own[seen], logits[seen])


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("mode", MODES)
def test_layer_mask_oracle(family: str, mode: str) -> None:
    model, inputs = model_of(family), build_inputs(family, rows_for(family))
    options = MODES[mode]
    selection = select(model, family, inputs, 0.3)
    keep = kept_columns(model, family, inputs, selection)
    answers = []
    with rows_expanded_by_hand(model, family):
        whole = run(model, inputs, **options)
        with masked_from_layer(model, 1, torch.ones_like(keep)):
            assert torch.equal(run(model, inputs, **options), whole)
        for layer in (0, 2):
            with masked_from_layer(model, layer, keep):
                answers.append(run(model, inputs, **options))
        want = run(model, masked(model, family, inputs, selection), **options)
    assert torch.equal(answers[0], want)
    assert not torch.equal(answers[1], want) and not torch.equal(answers[1], whole)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("padded", [True, False])
def test_layer_mask_oracle_in_forward(family: str, padded: bool) -> None:
    model = model_of(family)
    inputs = build_inputs(family, rows_for(family) if padded else [[4, "image", 2]])
    selection = select(model, family, inputs, 0.3)
    keep = kept_columns(model, family, inputs, selection)
    seen = keep & inputs["attention_mask"].bool()
    hidden = inputs | {"position_ids": positions(model, inputs), "use_cache": False}
    with torch.no_grad():
        whole = model(**hidden, output_hidden_states=True).hidden_states
        with masked_from_layer(model, 0, keep):
            first = model(**hidden).logits[seen]
        with masked_from_layer(model, 2, keep):
            third = model(**hidden, output_hidden_states=True).hidden_states
        want = model(**masked(model, family, inputs, selection)).logits[seen]
    torch.testing.assert_close(first, want)
    same = [torch.equal(a[seen], b[seen]) for a, b in zip(whole, third, strict=True)]
    assert same == [True] * 3 + [False] * (len(same) - 3)


@pytest.mark.parametrize("family", FAMILIES)
def test_places_are_in_the_order_of_the_prompt(family: str) -> None:
    model, inputs = model_of(family), build_inputs(family, rows_for(family))
    order = [places.tolist() for places in visual_places(model, family, inputs)]
    assert all(places == sorted(places) for places in order)
