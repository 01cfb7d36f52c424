"""The decoder layers written out in the test kit: without a rule they are the stock model's, and a
rule does what it says."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from tests.kit.matrix import MIXED, MODES, cached_inputs, model_of, run
from tests.kit.models import FAMILIES, WITH_VIDEO
from tests.kit.oracle import masked_from_layer, rows_expanded_by_hand
from tests.kit.plain_methods import prompt_of
from tests.kit.plain_rows import Rule, Sinks, Var, is_sink, restated, shared_out
from tests.kit.prompts import build_inputs, prompts

pytestmark = pytest.mark.filterwarnings("ignore:.*(do_sample|max_length).*")

LOGITS = {"return_dict_in_generate": True, "output_logits": True}
CLOSE = {"atol": 1e-5, "rtol": 1e-4}
SINKS = Sinks((3, 17, 40), 1.8)
RULES = {
    "frozen": Rule(attention=False, ffn=False),
    "no queries": Rule(attention=False),
    "no FFN": Rule(ffn=False),
    "near": Rule(radius=1),
    "heads": Rule(heads=(True, False, True, False)),
    "heads, mass lost": Rule(heads=(True, False, True, False), renormalize=False),
    "blind to sinks": Rule(sinks=SINKS, blind=True),
    "shared out": Rule(sinks=SINKS, var=Var(0.6, 0.3, 0.1)),
}


def depth(model: Any) -> int:
    return len(model.model.language_model.layers)


def everywhere(model: Any, rule: Rule) -> dict[int, Rule]:
    return dict.fromkeys(range(depth(model)), rule)


def logits(model: Any, inputs: Any) -> Tensor:
    with torch.no_grad():
        return model(**inputs).logits[inputs["attention_mask"].bool()]


@pytest.mark.parametrize("family", FAMILIES)
def test_without_rules_a_forward_is_the_stock_model(family: str) -> None:
    model = model_of(family)
    for prompt in prompts(family):
        inputs = cached_inputs(family, prompt)
        want = logits(model, inputs)
        with restated(model, prompt_of(model, family, inputs), everywhere(model, Rule())):
            got = logits(model, inputs)
        torch.testing.assert_close(got, want, **CLOSE)
        assert torch.equal(logits(model, inputs), want)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("family", FAMILIES)
def test_without_rules_every_way_of_generating_is_the_stock_model(family: str, mode: str) -> None:
    model = model_of(family)
    for prompt in (MIXED, "batch 1"):
        inputs = cached_inputs(family, prompt)
        if mode == "prompt lookup" and len(inputs["input_ids"]) > 1:
            continue
        with rows_expanded_by_hand(model, family):
            want = run(model, inputs, **MODES[mode], **LOGITS)
            with restated(model, prompt_of(model, family, inputs), everywhere(model, Rule())):
                got = run(model, inputs, **MODES[mode], **LOGITS)
        assert torch.equal(got.sequences, want.sequences)
        for a, b in zip(got.logits or (), want.logits or (), strict=True):
            torch.testing.assert_close(a, b, **CLOSE)


@pytest.mark.parametrize("mode", ["greedy", "beams", "static cache", "no cache"])
@pytest.mark.parametrize("rule", RULES)
def test_a_rule_changes_the_answer_and_is_the_same_in_every_mode(rule: str, mode: str) -> None:
    model, inputs = model_of("llava"), cached_inputs("llava", MIXED)
    prompt, rules = prompt_of(model, "llava", inputs), everywhere(model, RULES[rule])
    with rows_expanded_by_hand(model, "llava"):
        stock = run(model, inputs, **MODES[mode], **LOGITS)
        with restated(model, prompt, rules):
            got = run(model, inputs, **MODES[mode], **LOGITS)
            plain = run(model, inputs, **LOGITS)
    text_only = slice(2, 3)
    n = 3 if mode == "beams" else 1
    first = got.logits[0].unflatten(0, (-1, n))[:, 0]
    moved = (first - stock.logits[0].unflatten(0, (-1, n))[:, 0]).abs().amax(-1)
    assert (moved[:2] > 1e-3).all() and (moved[2:] < 1e-5).all()
    assert torch.equal(got.sequences[text_only], stock.sequences[text_only])
    torch.testing.assert_close(first, plain.logits[0], **CLOSE)
    if mode != "beams":
        assert torch.equal(got.sequences, plain.sequences)


def test_frozen_everywhere_means_that_no_layer_changes_a_visual_row() -> None:
    model, inputs = model_of("internvl"), cached_inputs("internvl", MIXED)
    prompt = prompt_of(model, "internvl", inputs)
    with torch.no_grad(), restated(model, prompt, everywhere(model, RULES["frozen"])):
        states = model(**inputs, output_hidden_states=True).hidden_states[:-1]
    text = ~prompt.visual & inputs["attention_mask"].bool()
    for after in states[1:]:
        assert torch.equal(after[prompt.visual], states[0][prompt.visual])
        assert not torch.isclose(after[text], states[0][text]).all()


def test_a_head_nobody_needs_is_a_model_without_the_picture() -> None:
    """With all heads pruned text does not know of the picture: as if it were masked."""
    model, inputs = model_of("qwen2_vl"), cached_inputs("qwen2_vl", MIXED)
    prompt = prompt_of(model, "qwen2_vl", inputs)
    text = ~prompt.visual & inputs["attention_mask"].bool()
    none = (False,) * 4
    with torch.no_grad():
        with masked_from_layer(model, 0, ~prompt.visual):
            want = model(**inputs).logits[text]
        with restated(model, prompt, everywhere(model, Rule(heads=none))):
            got = model(**inputs).logits[text]
        with restated(model, prompt, everywhere(model, Rule(heads=none, renormalize=False))):
            lost = model(**inputs).logits[text]
    torch.testing.assert_close(got, want, **CLOSE)
    assert not torch.isclose(lost, want, atol=1e-3).all()


def test_a_radius_that_covers_all_is_no_radius_where_there_is_one_part() -> None:
    model, inputs = model_of("llava"), cached_inputs("llava", "batch 1")
    prompt = prompt_of(model, "llava", inputs)
    want = logits(model, inputs)
    for radius, same in ((5, True), (4, False)):
        with restated(model, prompt, everywhere(model, Rule(radius=radius))):
            got = logits(model, inputs)
        assert torch.allclose(got, want, atol=1e-5) == same


@pytest.mark.parametrize("family", FAMILIES)
def test_parts_of_pictures(family: str) -> None:
    """Every part is a rectangle in raster order, and no two share a name."""
    names = [MIXED, *(["video", "video and image, image"] if family in WITH_VIDEO else [])]
    for name in names:
        inputs = cached_inputs(family, name)
        prompt = prompt_of(model_of(family), family, inputs)
        assert torch.equal(prompt.visual, prompt.cells[..., 0] >= 0)
        found: dict[int, list[tuple[int, ...]]] = {}
        for row, column in prompt.visual.nonzero().tolist():
            part, *cell = prompt.cells[row, column].tolist()
            found.setdefault(part, []).append((row, *cell))
        assert sorted(found) == list(range(len(found)))
        for cells in found.values():
            h, w = (max(cell[axis] for cell in cells) + 1 for axis in (1, 2))
            assert cells == [(cells[0][0], r, c) for r in range(h) for c in range(w)]


def test_parts_of_crops_and_frames() -> None:
    def parts(family: str, *rows: Any) -> list[int]:
        inputs = build_inputs(family, [list(rows)])
        prompt = prompt_of(model_of(family), family, inputs)
        return prompt.cells[prompt.visual][:, 0].unique(return_counts=True)[1].tolist()

    # the whole picture and a canvas of 3×6, unpadded
    assert parts("llava_next", "image", 3) == [9, 18]
    assert parts("internvl", ("image", 24, 48), 3) == [9, 9, 9]
    assert parts("qwen3_vl", "video", 3) == [6, 6]
    assert parts("qwen2_vl", "video", 1, ("image", 24, 24)) == [9, 6, 6]


def test_vector_t4() -> None:
    """methods-core.md §10: BOS, four image tokens, text; BOS and the first of the image sink."""
    a = torch.tensor([0.30, 0.25, 0.05, 0.10, 0.10, 0.20], dtype=torch.float64)
    sinks = torch.tensor([1, 1, 0, 0, 0, 0]).bool()
    visual = torch.tensor([0, 1, 1, 1, 1, 0]).bool()
    new, portion, seen, done = shared_out(a, sinks, visual, Var(rho=0.5, p=0.6, least=0.2))
    assert round(float(portion), 6) == 0.499996 and round(float(seen), 6) == 0.5 and done
    want = torch.tensor([0.18, 0.15, 0.094, 0.188, 0.188, 0.20], dtype=torch.float64)
    torch.testing.assert_close(new, want)
    for other in (Var(0.49, 0.6, 0.2), Var(0.5, 0.6, 0.51)):
        assert torch.equal(shared_out(a, sinks, visual, other)[0], a)
    no_visual_sink = torch.tensor([1, 0, 0, 0, 0, 0]).bool()
    assert torch.equal(shared_out(a, no_visual_sink, visual, Var(1.0, 0.6, 0.0))[0], a)


def test_a_sink_by_hand() -> None:
    x = torch.zeros(3, 100)
    x[:, 0] = 1.0
    x[0, 5], x[1, 6] = 1.0, 0.99
    # one of a hundred: RMS 0.1, of two 0.1414
    assert is_sink(x, Sinks((0,), 9.0)).tolist() == [False, False, True]
    assert is_sink(x, Sinks((5, 6), 7.0)).tolist() == [True, True, False]
    assert is_sink(-x, Sinks((5,), 7.0)).tolist() == [True, False, False]


def test_every_trace_is_removed() -> None:
    model, inputs = model_of("llava"), cached_inputs("llava", "batch 1")
    layers = model.model.language_model.layers
    config = model.model.language_model.config
    before = config._attn_implementation
    prompt = prompt_of(model, "llava", inputs)
    with (
        pytest.raises(RuntimeError, match="inside"),
        restated(model, prompt, everywhere(model, Rule())),
    ):
        assert all("forward" in vars(layer) for layer in layers)
        raise RuntimeError("inside")
    assert not any("forward" in vars(layer) for layer in layers)
    assert config._attn_implementation == before
