"""`vtc.calibrate` as a whole: what it takes, what it refuses, and that it leaves no trace."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor

import vtc
from tests.kit.models import FAMILIES, build_model
from tests.kit.prompts import Inputs, build_inputs
from vtc.errors import InputError, OptionError, PatchError, UnsupportedModelError, VtcError


def sample(family: str = "llava", seed: int = 0) -> Inputs:
    return build_inputs(family, [[4, "image", 5]], seed=seed)


def quiet(model: Any, samples: Any, **options: Any) -> vtc.Calibration:
    return vtc.calibrate(model, samples, progress=False, **options)


def hooks(model: Any) -> int:
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())


def state(model: Any) -> dict[str, Any]:
    """What a trace would show in: attributes of all modules, but for their parts."""
    return {
        f"{name}.{key}": value
        for name, module in model.named_modules()
        for key, value in vars(module).items()
        if not key.startswith("_") or key == "_attn_implementation"
    }


def logits(model: Any, inputs: Inputs) -> Tensor:
    with torch.no_grad():
        return model(**inputs).logits


def same(a: Any, b: Any) -> bool:
    return a is b or (torch.equal(a, b) if isinstance(a, Tensor) else a == b)


@pytest.mark.parametrize("fails", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_the_model_is_what_it_was(family: str, fails: bool) -> None:
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    model, inputs = build_model(family), sample(family)
    # the first run of a stock model leaves hooks of its own
    want, weights = logits(model, inputs), copy.deepcopy(model.state_dict())
    # of another shape, so that its positions differ
    other = build_inputs(family, [[6, ("image", 40, 32), 3]])
    before, count, names = state(model), hooks(model), set(ALL_ATTENTION_FUNCTIONS)
    if fails:
        # in the middle of a run, with everything attached
        layer = model.model.language_model.layers[2]
        stop = layer.self_attn.register_forward_hook(_fail)
        with pytest.raises(RuntimeError, match="broken off"):
            quiet(model, [other])
        stop.remove()
    else:
        quiet(model, [other])
    assert hooks(model) == count and set(ALL_ATTENTION_FUNCTIONS) == names
    after = state(model)
    assert after.keys() == before.keys()
    assert [key for key in before if not same(before[key], after[key])] == []
    assert all(torch.equal(w, weights[name]) for name, w in model.state_dict().items())
    assert torch.equal(logits(model, inputs), want)


def _fail(*_: Any) -> None:
    raise RuntimeError("broken off")


def test_gradients_stay_on_and_none_are_kept() -> None:
    model = build_model("llava")
    quiet(model, [sample()])
    assert torch.is_grad_enabled()
    assert all(p.grad is None and p.requires_grad for p in model.parameters())


def test_parts_are_measured_alone_as_together() -> None:
    model, samples = build_model("llava"), [sample(seed=seed) for seed in range(2)]
    whole = quiet(model, samples)
    layers, sinks, heads = (quiet(model, samples, what=w) for w in ("layers", "sinks", "heads"))
    assert layers.layer_contribution == whole.layer_contribution is not None
    assert (sinks.sink_dims, sinks.activations) == (whole.sink_dims, whole.activations)
    assert heads.head_ratio == whole.head_ratio is not None
    assert layers.sink_dims is layers.head_ratio is sinks.layer_contribution is None
    both = quiet(model, samples, what=["heads", "layers"])
    assert both.layer_contribution and both.head_ratio and both.sink_dims is None


def test_samples_may_come_one_by_one() -> None:
    model = build_model("llava")
    found = quiet(model, (sample(seed=seed) for seed in range(3)))
    assert found == quiet(model, [sample(seed=seed) for seed in range(3)])
    assert found.samples == 3 and found.source == "measured on 3 samples"


def test_it_fits_the_model_it_was_measured_on() -> None:
    from vtc.adapters.registry import adapter_of
    from vtc.calibration import calibration_of
    from vtc.runtime.tower import facts_of

    for family in FAMILIES:
        model = build_model(family)
        found, facts = quiet(model, [sample(family)]), facts_of(adapter_of(model))
        for what in ("layer_contribution", "sink_dims", "head_ratio"):
            assert calibration_of(found, facts, what) is found


def test_bfloat16_is_near_float32() -> None:
    model = build_model("llava")
    whole = quiet(model, [sample()])
    half = quiet(model.to(torch.bfloat16), [sample()])
    assert whole.layer_contribution and half.layer_contribution and half.layer_contribution[-1] == 0
    # 8 bits: ratios of attention within a few percent
    torch.testing.assert_close(
        torch.tensor(half.head_ratio), torch.tensor(whole.head_ratio), rtol=0.2, atol=0
    )


def _without(name: str) -> Inputs:
    return {key: x for key, x in sample().items() if key != name}


def _two_rows() -> Inputs:
    return build_inputs("llava", [[4, "image", 5], [2, "image", 7]])


REFUSED: dict[str, tuple[Any, str]] = {
    "none": ([], "there are no samples, expected at least one"),
    "one mapping": (sample(), r"samples is one mapping, expected a list of them: pass \[inputs\]"),
    "a string": (["what is this?"], "sample 0: it is a str, expected a mapping"),
    "no images": (
        [sample(), _without("pixel_values")],
        r"sample 1: it has no images \(pixel_values\), expected some",
    ),
    "no ids": ([_without("input_ids")], "input_ids are NoneType, expected a tensor"),
    "two rows": ([_two_rows()], r"input_ids are \(2, .*\), expected a tensor \(1, entries\)"),
    "ends with the image": (
        [build_inputs("llava", [[4, "image"]])],
        "sample 0: the prompt ends with an image, expected text behind it",
    ),
    "too few placeholders": (
        [sample() | {"input_ids": torch.ones(1, 12, dtype=torch.long)}],
        "sample 0: input_ids hold 0 image placeholders",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused_samples(name: str) -> None:
    samples, message = REFUSED[name]
    model = build_model("llava")
    logits(model, sample())
    count = hooks(model)
    with pytest.raises(InputError, match=message):
        quiet(model, samples)
    assert hooks(model) == count


@pytest.mark.parametrize("what", ["everything", [], ["layers", "dims"]])
def test_unknown_parts_are_refused(what: Any) -> None:
    with pytest.raises(OptionError, match="expected one or more of layers, sinks, heads"):
        quiet(build_model("llava"), [sample()], what=what)


def test_patched_and_unknown_models_are_refused() -> None:
    model = build_model("llava")
    with (
        vtc.patch(model, "random", keep=0.5),
        pytest.raises(PatchError, match="this model is patched, expected a stock one"),
    ):
        quiet(model, [sample()])
    quiet(model, [sample()])
    with pytest.raises(UnsupportedModelError):
        quiet(torch.nn.Linear(2, 2), [sample()])


def test_an_answer_that_is_no_number_is_refused() -> None:
    model = build_model("llava")
    with torch.no_grad():
        model.lm_head.weight[3] = float("inf")
    with pytest.raises(VtcError, match=r"not finite in torch\.float32, expected numbers"):
        quiet(model, [sample()])


def test_the_bar_is_shown_if_wanted(capfd: pytest.CaptureFixture[str]) -> None:
    model = build_model("llava")
    quiet(model, [sample()], what="sinks")
    assert capfd.readouterr().err == ""
    vtc.calibrate(model, [sample()], what="sinks")
    assert "calibrating" in capfd.readouterr().err
