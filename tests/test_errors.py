"""Wrong uses of the Python interface: one clear line each, and the model stays as it was."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

import vtc
from vtc import errors
from vtc.methods import registry

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
    "a list of methods": (
        {"method": ["vtc_cls"], "keep": 0.5},
        errors.OptionError,
        "method ['vtc_cls'] is unknown",
    ),
    "a method's class": (
        {"method": type(vtc.method("vtc_cls")), "keep": 0.5},
        errors.OptionError,
        "method is the class VtcCls, expected a vtc.Method object or a name: pass VtcCls()",
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
        {"method": "vtc_cls", "keep": 0.5, "begin": 3},
        errors.OptionError,
        "has no option 'begin'; it has",
    ),
    "option of a wrong type": (
        {"method": "vtc_cls", "keep": 0.5, "start": "16"},
        errors.OptionError,
        "expected int, got str",
    ),
    "option that is a bool": (
        {"method": "vtc_cls", "keep": 0.5, "start": True},
        errors.OptionError,
        "expected int, got bool",
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
    "scorer's class": (
        {"method": "vtc_cls", "keep": 0.5, "scorer": type(vtc.method("random").active_scorer)},
        errors.OptionError,
        "Field 'scorer' with value <class",
    ),
    "selector without its scores": (
        {"method": "uniform", "keep": 0.5, "selector": "top_k"},
        errors.OptionError,
        "'uniform' got selector 'top_k' and no scorer, expected one",
    ),
    "selector of another count": (
        {"method": "downsample", "keep": 0.5, "selector": "top_k", "scorer": "random"},
        errors.OptionError,
        "which keeps 'exact' of the budget, expected one that keeps 'at_most'",
    ),
    "scorer for nothing": (
        {"method": "average_pool", "keep": 0.5, "scorer": "random"},
        errors.OptionError,
        "'average_pool' got a scorer, expected none",
    ),
    "scorer of the full model": (
        {"method": "none", "scorer": "random"},
        errors.OptionError,
        "'none' got a scorer or selector, expected none",
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
    "a list of positions": (
        {"method": "vtc_cls", "keep": 0.5, "positions": ["keep"]},
        errors.OptionError,
        "positions=['keep'] is unknown",
    ),
    "an array of positions": (
        {"method": "vtc_cls", "keep": 0.5, "positions": np.array(["keep", "keep"])},
        errors.OptionError,
        "positions=array(['keep', 'keep'], dtype='<U4') is unknown",
    ),
    "unknown fast path": (
        {"method": "vtc_cls", "keep": 0.5, "fast": "very"},
        errors.OptionError,
        "fast='very' is unknown",
    ),
    "unknown kernels": (
        {"method": "vtc_cls", "keep": 0.5, "kernels": "cuda"},
        errors.OptionError,
        "kernels='cuda' is unknown",
    ),
    "no Triton kernel": (
        {"method": "vtc_cls", "keep": 0.5, "kernels": "triton"},
        errors.OptionError,
        "expected a CUDA device",
    ),
    "seed of a wrong type": (
        {"method": "random", "keep": 0.5, "seed": "0"},
        errors.OptionError,
        "seed='0' is a str",
    ),
    "seed that is a float": (
        {"method": "random", "keep": 0.5, "seed": 1.0},
        errors.OptionError,
        "seed=1.0 is a float",
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


def test_numpy_integers_are_integers(llava: Any, make_inputs: Any) -> None:
    options = {"keep": np.int64(5), "seed": np.int64(3), "start": np.int64(2)}
    with vtc.patch(llava, "vtc_cls", **options) as handle:
        llava.generate(**make_inputs([[4, None, 5]]), max_new_tokens=1)
    assert handle.report().llm_tokens == (5,)
    assert repr(handle.method) == repr(vtc.method("vtc_cls", start=2))


def test_messages_differ(llava: Any) -> None:
    assert len({said for _, _, said in BAD_PATCHES.values()}) == len(BAD_PATCHES)


def test_patching_twice(llava: Any) -> None:
    with vtc.patch(llava, "vtc_cls", 0.5) as handle:
        with pytest.raises(
            errors.PatchError, match=r"patched already with VtcCls.*call vtc.unpatch"
        ) as error:
            vtc.patch(llava, "random", 0.5)
        one_line(error)
        assert vars(llava)["_vtc_handle"] is handle


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


def no_images(inputs: dict[str, torch.Tensor]) -> None:
    inputs["pixel_values"] = inputs["pixel_values"][:0]


def no_pixels(inputs: dict[str, torch.Tensor]) -> None:
    del inputs["pixel_values"]


def pixels_of_none(inputs: dict[str, Any]) -> None:
    inputs["pixel_values"] = None


def one_channel(inputs: dict[str, torch.Tensor]) -> None:
    inputs["pixel_values"] = inputs["pixel_values"][:, :1]


def nested_pixels(inputs: dict[str, torch.Tensor]) -> None:
    inputs["pixel_values"] = inputs["pixel_values"][None]


def array_of_pixels(inputs: dict[str, Any]) -> None:
    inputs["pixel_values"] = inputs["pixel_values"].numpy()


def one_row_without_batch(inputs: dict[str, torch.Tensor]) -> None:
    inputs["input_ids"] = inputs["input_ids"][0]


def list_for_a_mask(inputs: dict[str, Any]) -> None:
    inputs["attention_mask"] = inputs["attention_mask"].tolist()


def mask_too_short(inputs: dict[str, torch.Tensor]) -> None:
    inputs["attention_mask"] = inputs["attention_mask"][:, 1:]


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
    "no image in the pixels": (no_images, "pixel_values hold no image, expected at least one"),
    "no pixels": (no_pixels, "72 image placeholders and no pixel_values came with them"),
    "pixels that are None": (pixels_of_none, "expected both or neither"),
    "one channel": (one_channel, "pixel_values is (2, 1, 24, 24), expected"),
    "pixels with a batch dimension": (nested_pixels, "pixel_values is (1, 2, 3, 24, 24), expected"),
    "pixels not a tensor": (array_of_pixels, "pixel_values is ndarray, expected a tensor"),
    "ids without a batch dimension": (
        one_row_without_batch,
        "pixel_values came with input_ids of (47,), expected a tensor [B, S] of ids",
    ),
    "a mask that is a list": (list_for_a_mask, "list, expected"),
    "a mask too short": (mask_too_short, "(2, 46), expected"),
    "a prepared mask": (four_dimensional_mask, "(2, 1, 47, 47), expected"),
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
        ({"vision_feature_layer": -1}, "vision_feature_layer=-1 was given in a call, expected -2"),
        (
            {"vision_feature_select_strategy": "full"},
            "vision_feature_select_strategy='full' was given in a call, expected 'default'",
        ),
        ({"max_length": 10}, "max_length=10 leaves no room behind a prompt of 45 tokens"),
        ({"inputs_embeds": torch.zeros(1, 45, 64)}, "got inputs_embeds beside pixel_values"),
        ({"inputs": torch.zeros(1, 45)}, "got both inputs and input_ids"),
    ],
)
def test_modes_that_would_be_wrong_are_refused(
    llava: Any, make_inputs: Any, options: dict[str, Any], said: str
) -> None:
    inputs = make_inputs([[4, None, 5]])
    with vtc.patch(llava, "vtc_cls", 0.5), pytest.raises(vtc.VtcError) as error:
        llava.generate(**inputs, **options)
    assert said in one_line(error)


def test_continuous_batching_is_refused(llava: Any, make_inputs: Any) -> None:
    calls: list[Callable[[], Any]] = [
        lambda: llava.generate_batch([[1, 2]]),
        lambda: llava.init_continuous_batching(),
        lambda: llava.continuous_batching_context_manager(),
        lambda: llava.generate(**make_inputs([[4, None, 5]]), cache_implementation="paged"),
    ]
    for call in calls:
        with (
            vtc.patch(llava, "vtc_cls", 0.5),
            pytest.raises(errors.UnsupportedModeError, match=r"continuous batching.*vtc.unpatch"),
        ):
            call()
        assert "init_continuous_batching" not in vars(llava)


def test_a_patched_assistant_is_refused(llava: Any, make_llava: Any, make_inputs: Any) -> None:
    inputs, assistant = make_inputs([[4, None, 5]]), make_llava(seed=1)
    with (
        vtc.patch(assistant, "vtc_cls", 0.5),
        vtc.patch(llava, "vtc_cls", 0.5),
        pytest.raises(errors.UnsupportedModeError, match="assistant_model is patched itself"),
    ):
        llava.generate(**inputs, assistant_model=assistant, max_new_tokens=2)


def test_a_decoding_loop_that_ignores_the_short_prompt(llava: Any, make_inputs: Any) -> None:
    inputs = make_inputs([[4, None, 5]])

    def own_ids(model: Any, input_ids: torch.Tensor, **_: Any) -> Any:
        return model(input_ids=input_ids).logits.argmax(-1)

    def no_model(model: Any, input_ids: torch.Tensor, **_: Any) -> torch.Tensor:
        return input_ids

    def prepared(model: Any, input_ids: torch.Tensor, **kwargs: Any) -> torch.Tensor:
        known = {k: kwargs[k] for k in ("inputs_embeds", "attention_mask", "position_ids")}
        given = model.prepare_inputs_for_generation(input_ids, is_first_iteration=True, **known)
        token = model(**given).logits[:, -1].argmax(-1, keepdim=True)
        return torch.cat([input_ids, token], -1)

    with vtc.patch(llava, "vtc_cls", 0.5):
        for loop in (own_ids, no_model):
            with pytest.raises(errors.NeverCompressedError, match="expected its first forward"):
                llava.generate(**inputs, custom_generate=loop, max_new_tokens=1)
        want = llava.generate(**inputs, max_new_tokens=1, do_sample=False)
        got = llava.generate(**inputs, custom_generate=prepared, max_new_tokens=1)
        assert torch.equal(got, want)


def test_generate_that_passes_the_patch_by_is_no_silent_stock(llava: Any, make_inputs: Any) -> None:
    """Called unbound, or kept from before the patch: compressed in the forward seam, or refused."""
    from transformers import GenerationMixin

    inputs, text = make_inputs([[4, None, 5]]), make_inputs([[7]])
    kept = llava.generate
    want = llava.generate(**text, max_new_tokens=3, do_sample=False)
    with vtc.patch(llava, "vtc_cls", 0.5) as handle:
        for generate in (kept, lambda **given: GenerationMixin.generate(llava, **given)):
            try:
                generate(**inputs, max_new_tokens=3, do_sample=False)
            except errors.UnsupportedModeError as error:
                assert "call the model's own generate" in str(error)
            else:
                assert handle.report().llm_tokens == (18,)
            assert torch.equal(generate(**text, max_new_tokens=3, do_sample=False), want)


@pytest.mark.parametrize("call", ["generate", "forward"])
def test_a_prompt_beyond_a_sliding_window_is_refused(
    llava: Any, make_inputs: Any, monkeypatch: pytest.MonkeyPatch, call: str
) -> None:
    inputs = make_inputs([[4, None, 5]])
    monkeypatch.setattr(llava.model.language_model.config, "sliding_window", 44, raising=False)

    def run() -> Any:
        return llava(**inputs) if call == "forward" else llava.generate(**inputs, max_new_tokens=1)

    with vtc.patch(llava, "vtc_cls", 1.0) as handle:
        run()
        handle.set(keep=0.5)
        with pytest.raises(errors.UnsupportedModeError, match="a prompt of 45 tokens meets"):
            run()


def test_nan_scores(llava: Any, make_inputs: Any) -> None:
    inputs = make_inputs([[4, None, 5]])
    inputs["pixel_values"][0, 0, 0, 0] = float("nan")
    with vtc.patch(llava, "vtc_cls", 0.5), pytest.raises(vtc.VtcError, match="NaN scores"):
        llava.generate(**inputs, max_new_tokens=1)


@pytest.mark.parametrize("thing", [vtc.method("random"), "random", int])
def test_registering_what_is_no_method(thing: Any) -> None:
    with pytest.raises(errors.OptionError, match=r"expected a class derived from vtc\.Method"):
        vtc.register(thing)


def test_a_name_that_is_taken() -> None:
    class Mine(vtc.Method):
        name = "random"
        summary = "not the one you think"

    with pytest.raises(errors.OptionError, match="'random' exists already"):
        vtc.register(Mine)


def test_another_class_of_a_registered_name() -> None:
    def mine(summary: str) -> type[vtc.Method]:
        @vtc.register
        class MineAgain(vtc.Method):
            __doc__ = summary

        return MineAgain

    try:
        mine("a cell of a notebook")
        # defined once more, in the same place
        again = mine("the same cell, run again")
        assert registry._table()["MineAgain"] is again

        class MineAgain(vtc.Method):
            """Of the same name, from elsewhere."""

        with pytest.raises(errors.OptionError, match="'MineAgain' exists already"):
            vtc.register(MineAgain)
    finally:
        registry._REGISTERED.pop("MineAgain", None)
