"""Wrong uses of the Python interface: one clear line each, and the model stays as it was."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

import vtc
from vtc import errors

BAD_PATCHES: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "unknown method": (
        {"method": "flowcat", "keep": 0.5},
        errors.OptionError,
        "'flowcat' is unknown; expected one of",
    ),
    "method of a wrong type": (
        {"method": 3, "keep": 0.5},
        errors.OptionError,
        "3 is unknown; expected one of",
    ),
    "keep 0": (
        {"method": "vtc_cls", "keep": 0},
        errors.OptionError,
        "keep=0 tokens is out of range, expected at least 1",
    ),
    "keep 1.5": (
        {"method": "vtc_cls", "keep": 1.5},
        errors.OptionError,
        "keep=1.5 is out of range",
    ),
    "keep -3": (
        {"method": "vtc_cls", "keep": -3},
        errors.OptionError,
        "keep=-3 tokens is out of range",
    ),
    "keep half": (
        {"method": "vtc_cls", "keep": "half"},
        errors.OptionError,
        "keep='half' is a str, expected a number",
    ),
    "keep True": ({"method": "vtc_cls", "keep": True}, errors.OptionError, "keep=True is a bool"),
    "keep missing": (
        {"method": "vtc_cls"},
        errors.OptionError,
        "got keep=None, expected how much is kept",
    ),
    "keep for the full model": (
        {"method": "none", "keep": 0.5},
        errors.OptionError,
        "keeps everything and got keep=0.5",
    ),
    "unknown option": (
        {"method": "vtc_cls", "keep": 0.5, "strat": 3},
        errors.OptionError,
        "has no option 'strat'; it has",
    ),
    "option of a wrong type": (
        {"method": "vtc_cls", "keep": 0.5, "start": "16"},
        errors.OptionError,
        "expected int, got str",
    ),
    "option out of its choices": (
        {"method": "vtc_cls", "keep": 0.5, "ensemble": "mean"},
        errors.OptionError,
        "expected one of",
    ),
    "unknown scorer": (
        {"method": "vtc_cls", "keep": 0.5, "scorer": "best"},
        errors.OptionError,
        "scorer 'best' is unknown",
    ),
    "options beside an object": (
        {"method": vtc.method("vtc_cls"), "keep": 0.5, "start": 3},
        errors.OptionError,
        "beside a method object",
    ),
    "unknown positions": (
        {"method": "vtc_cls", "keep": 0.5, "positions": "orig"},
        errors.OptionError,
        "positions='orig' is unknown",
    ),
    "fast path": (
        {"method": "vtc_cls", "keep": 0.5, "fast": True},
        errors.OptionError,
        "no fast path",
    ),
    "unknown kernels": (
        {"method": "vtc_cls", "keep": 0.5, "kernels": "cuda"},
        errors.OptionError,
        "kernels='cuda' is unknown",
    ),
    "no Triton kernel": (
        {"method": "vtc_cls", "keep": 0.5, "kernels": "triton"},
        errors.OptionError,
        "no Triton kernel",
    ),
    "seed of a wrong type": (
        {"method": "random", "keep": 0.5, "seed": "0"},
        errors.OptionError,
        "seed='0' is a str",
    ),
    "start behind the tap": (
        {"method": "vtc_cls", "keep": 0.5, "start": 23},
        errors.SignalError,
        "leaves no block",
    ),
}


def one_line(error: pytest.ExceptionInfo[Exception]) -> str:
    text = str(error.value)
    assert "\n" not in text
    assert isinstance(error.value, vtc.VtcError)
    return text


@pytest.mark.parametrize("case", BAD_PATCHES)
def test_bad_patch(llava: Any, case: str) -> None:
    options, kind, said = BAD_PATCHES[case]
    before = dict(vars(llava))
    with pytest.raises(kind) as error:
        vtc.patch(llava, **options)
    assert said in one_line(error)
    assert vars(llava) == before
    assert not llava.model._forward_pre_hooks


def test_messages_differ(llava: Any) -> None:
    assert len({said for _, _, said in BAD_PATCHES.values()}) == len(BAD_PATCHES)


def test_patching_twice(llava: Any) -> None:
    with vtc.patch(llava, "vtc_cls", 0.5) as handle:
        with pytest.raises(
            errors.PatchError, match=r"patched already with VtcCls.*call vtc.unpatch"
        ) as error:
            vtc.patch(llava, "random", 0.5)
        one_line(error)
        assert llava.generate.vtc_handle is handle


@pytest.mark.parametrize("thing", [torch.nn.Linear(2, 2), "llava-hf/llava-1.5-7b-hf", None])
def test_unsupported_class(thing: Any) -> None:
    with pytest.raises(
        errors.UnsupportedModelError, match=r"expected a stock .*LlavaForConditionalGeneration"
    ) as error:
        vtc.patch(thing, "vtc_cls", 0.5)
    one_line(error)
    with pytest.raises(errors.PatchError, match="is not patched"):
        vtc.unpatch(thing)


def test_base_model_without_a_head_is_unsupported(llava: Any) -> None:
    with pytest.raises(errors.UnsupportedModelError, match="cannot patch a LlavaModel"):
        vtc.patch(llava.model, "vtc_cls", 0.5)


def test_unpatching_an_unpatched_model(llava: Any) -> None:
    with pytest.raises(
        errors.PatchError, match=r"is not patched; expected one that vtc.patch was called on"
    ) as error:
        vtc.unpatch(llava)
    one_line(error)


def test_feature_strategy_that_is_no_grid(make_llava: Any) -> None:
    with pytest.raises(
        errors.UnsupportedModelError, match="'full' with a clip_vision_model tower"
    ) as error:
        vtc.patch(make_llava(vision_feature_select_strategy="full"), "vtc_cls", 0.5)
    one_line(error)


def drop_image(inputs: dict[str, torch.Tensor]) -> None:
    inputs["pixel_values"] = inputs["pixel_values"][:1]


def drop_placeholder(inputs: dict[str, torch.Tensor]) -> None:
    inputs["input_ids"][0, 8] = 7


def swap_sizes(inputs: dict[str, torch.Tensor]) -> None:
    """The right number of placeholders in all, but not image by image."""
    inputs["input_ids"][0, 8] = 7
    inputs["input_ids"][1, -1] = 90


def flatten_pixels(inputs: dict[str, torch.Tensor]) -> None:
    inputs["pixel_values"] = inputs["pixel_values"][0]


def four_dimensional_mask(inputs: dict[str, torch.Tensor]) -> None:
    width = inputs["input_ids"].shape[1]
    inputs["attention_mask"] = torch.ones(2, 1, width, width, dtype=torch.bool)


BAD_INPUTS: dict[str, tuple[Callable[[dict[str, torch.Tensor]], None], str]] = {
    "fewer images than placeholders": (
        drop_image,
        "input_ids hold 72 image placeholders, expected 36 for 1 images",
    ),
    "a placeholder missing": (
        drop_placeholder,
        "input_ids hold 71 image placeholders, expected 72 for 2 images",
    ),
    "an image over two rows": (swap_sizes, "spread over two rows, expected each image in one row"),
    "pixels without images": (
        flatten_pixels,
        r"pixel_values is (3, 24, 24), expected a tensor [images, 3",
    ),
    "a prepared mask": (four_dimensional_mask, "expected"),
}


@pytest.mark.parametrize("call", ["generate", "forward"])
@pytest.mark.parametrize("case", BAD_INPUTS)
def test_bad_inputs(llava: Any, make_inputs: Any, case: str, call: str) -> None:
    spoil, said = BAD_INPUTS[case]
    inputs = make_inputs([[4, None, 5], [2, None, 9]])
    spoil(inputs)
    with vtc.patch(llava, "vtc_cls", 0.5), pytest.raises(vtc.VtcError) as error:
        llava.generate(**inputs, max_new_tokens=1) if call == "generate" else llava(**inputs)
    assert said in one_line(error)


@pytest.mark.parametrize(
    "options, said",
    [
        ({"prefill_chunk_size": 8}, "prefill_chunk_size was given, expected None"),
        ({"vision_feature_layer": -1}, "vision_feature_layer was given in a call"),
        ({"max_length": 10}, "max_length=10 leaves no room behind a prompt of 45 tokens"),
    ],
)
def test_modes_that_would_be_wrong_are_refused(
    llava: Any, make_inputs: Any, options: dict[str, Any], said: str
) -> None:
    inputs = make_inputs([[4, None, 5]])
    with vtc.patch(llava, "vtc_cls", 0.5), pytest.raises(vtc.VtcError) as error:
        llava.generate(**inputs, **options)
    assert said in one_line(error)


def test_continuous_batching_is_refused(llava: Any) -> None:
    with (
        vtc.patch(llava, "vtc_cls", 0.5),
        pytest.raises(errors.UnsupportedModeError, match=r"vtc.unpatch"),
    ):
        llava.generate_batch([[1, 2]])


def test_a_cache_of_a_compressed_prompt_is_refused(llava: Any, make_inputs: Any) -> None:
    inputs = make_inputs([[4, None, 5]])
    with vtc.patch(llava, "vtc_cls", 0.5):
        out = llava.generate(**inputs, max_new_tokens=2, return_dict_in_generate=True)
        ids = torch.cat([out.sequences, torch.tensor([[7, 8]])], 1)
        with pytest.raises(
            errors.UnsupportedModeError, match="cache that holds a compressed prompt"
        ):
            llava.generate(input_ids=ids, past_key_values=out.past_key_values, max_new_tokens=2)


def test_nan_scores(llava: Any, make_inputs: Any) -> None:
    inputs = make_inputs([[4, None, 5]])
    inputs["pixel_values"][0, 0, 0, 0] = float("nan")
    with vtc.patch(llava, "vtc_cls", 0.5), pytest.raises(vtc.VtcError, match="NaN scores"):
        llava.generate(**inputs, max_new_tokens=1)


def test_a_name_that_is_taken() -> None:
    class Mine(vtc.Method):
        name = "random"
        summary = "not the one you think"

    with pytest.raises(errors.OptionError, match="'random' exists already"):
        vtc.register(Mine)
