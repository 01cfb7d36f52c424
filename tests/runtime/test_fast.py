"""The fast path: the same answers as without it, few captures, little memory, honest refusals.

`fast="eager"` runs its code, static buffers and padding included, without a GPU.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch

import vtc
from tests.kit.answers import answered
from tests.kit.models import FAMILIES, PLACEHOLDERS, build_model
from tests.kit.prompts import build_inputs, prompts
from vtc.errors import OptionError, VtcError
from vtc.methods.base import Method
from vtc.runtime.fast_llm import bucket
from vtc.scorers import Scorer

METHODS: dict[str, tuple[str, Any, dict[str, Any]]] = {
    "vtc_cls": ("vtc_cls", 0.3, {}),
    "todre": ("todre", 0.3, {"stage2": False}),
    "todre, stage 2": ("todre", 0.3, {}),
    "random": ("random", 5, {}),
    "average_pool": ("average_pool", 0.3, {}),
    "downsample": ("downsample", 0.3, {}),
    "flowcut": ("flowcut", 0.3, {"llm_cut": "off"}),
    "shortv": ("shortv", 0.5, {"scores": "calibrated"}),
    "none": ("none", 1.0, {}),
}
DEFAULT = ("vtc_cls", "todre", "average_pool", "none")
WHOLE = ("two images in one prompt", "adjacent images")


@pytest.fixture(scope="module", params=FAMILIES)
def family(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def model(family: str) -> Any:
    return build_model(family)


def generated(model: Any, inputs: dict[str, Any], **more: Any) -> Any:
    return answered(model, inputs, 5, **more)


@torch.no_grad()
def logits_of(model: Any, inputs: dict[str, Any]) -> torch.Tensor:
    """Of the entries that are attended to; what stands at padding is nobody's."""
    return model(**inputs).logits * inputs["attention_mask"][..., None]


def agree(model: Any, inputs: dict[str, Any], method: Any, keep: Any, **options: Any) -> Any:
    """Compares the fast path with the plain one, twice: captured, then replayed."""
    with vtc.patch(model, method, keep, **options):
        want, want_logits = generated(model, inputs), logits_of(model, inputs)
    with vtc.patch(model, method, keep, fast="eager", **options) as handle:
        for _ in range(2):
            got = generated(model, inputs)
            report = handle.report()
            assert torch.equal(got.sequences, want.sequences)
            for a, b in zip(got.logits, want.logits, strict=True):
                torch.testing.assert_close(a, b, atol=2e-5, rtol=1e-4)
            torch.testing.assert_close(logits_of(model, inputs), want_logits, atol=2e-5, rtol=1e-4)
    return report


@pytest.mark.parametrize("kind", ["ragged", "mixed: two images, one image, text only"])
@pytest.mark.parametrize("method", DEFAULT)
def test_equals_the_plain_path(model: Any, family: str, method: str, kind: str) -> None:
    name, keep, options = METHODS[method]
    inputs = build_inputs(family, prompts(family)[kind])
    report = agree(model, inputs, name, keep, **options)
    if family == "qwen3_vl":
        assert "added between decoder layers" in report.fast["prefill"]
    else:
        assert report.fast["prefill"] == report.fast["decode"] == "eager"


@pytest.mark.slow
@pytest.mark.parametrize("method", [m for m in METHODS if m != "shortv"])
def test_equals_the_plain_path_everywhere(model: Any, family: str, method: str) -> None:
    name, keep, options = METHODS[method]
    for said, rows in prompts(family).items():
        # canvases that are made smaller, and videos, are refused whatever `fast` is
        if (family, method) != ("llava_onevision", "flowcut") or said in WHOLE:
            agree(model, build_inputs(family, rows), name, keep, **options)


@pytest.mark.parametrize("kind", WHOLE)
def test_cuts_inside_the_encoder_are_captured(model: Any, family: str, kind: str) -> None:
    name, keep, options = METHODS["flowcut"]
    report = agree(model, build_inputs(family, prompts(family)[kind]), name, keep, **options)
    if family == "qwen3_vl":
        assert "inner blocks" in report.fast["encoder"]
    else:
        assert report.fast["encoder"] == report.fast["selection"] == "eager"


def test_as_many_newlines_as_padding() -> None:
    # 45 and 33 tokens of two images with 6 newlines each are as many as 45 of two
    model = build_model("llava_next")
    inputs = build_inputs("llava_next", [[3, ("image", 24, 24), 5], [2, ("image", 40, 24), 4]])
    agree(model, inputs, "todre", 4, stage2=False)


@pytest.mark.parametrize("depth", [4, 6])
def test_layers_before_the_first_cut_are_captured(depth: int) -> None:
    model, inputs = build_model("llava", layers=depth), llava()[1]
    # a composition is not captured with its cuts
    report = agree(model, inputs, vtc.compose(("vtc_cls", 0.5), ("todre", 0.3)), None)
    last = max(1, min(round(7 * depth / 8), depth - 1)) - 2
    assert report.fast["prefill"].startswith(f"eager up to layer {last}; then the method decides")
    assert "decides between decoder layers" in report.fast["decode"]
    assert report.fast["encoder"] == "eager"


def test_stages_that_look_at_other_blocks_are_told_apart() -> None:
    model, inputs = llava()
    stages = vtc.compose(("vtc_cls", 0.5), ("todre", 0.3, {"stage2": False}))
    assert agree(model, inputs, stages, None).fast["selection"] == "eager"


def llava() -> tuple[Any, dict[str, Any]]:
    return build_model("llava"), build_inputs("llava", prompts("llava")["ragged"])


def test_prompts_of_a_bucket_share_what_is_captured() -> None:
    model = build_model("llava_next")
    sizes = [(24, 12), (12, 24), (24, 24), (12, 36), (20, 12), (24, 20), (12, 12), (18, 24)]
    with vtc.patch(model, "vtc_cls", 12, fast="eager") as handle:
        graphs = handle._session.fast.graphs  # type: ignore[union-attr]
        seen = []
        for i, size in enumerate(sizes * 3):
            inputs = build_inputs("llava_next", [[3 + i % 4, ("image", *size), 4]], seed=i)
            generated(model, inputs)
            seen.append((graphs.captures, handle.report().fast))
        llm = [key for key in graphs._held if key[0] == "language model"]  # type: ignore[index]
    # one prefill and one decode step serve all of them; encoder and decision depend on the size,
    # and are captured when a size comes again
    assert len(llm) == 2 == seen[len(sizes) - 1][0]
    assert seen[2 * len(sizes) - 1][0] == seen[-1][0] <= 2 + 2 * len(sizes)
    parts = ("encoder", "selection", "prefill", "decode")
    assert all(said == dict.fromkeys(parts, "eager") for _, said in seen[len(sizes) :])
    assert all("comes again" in said["encoder"] for _, said in seen[: len(sizes)])


def test_what_is_held_is_bounded() -> None:
    model, _ = llava()
    with vtc.patch(model, "uniform", 4, fast="eager") as handle:
        fast = handle._session.fast
        assert fast is not None
        fast.graphs.limit = 4
        held = []
        for batch in (1, 2, 3, 4, 5, 6, 7, 1, 2):
            inputs = build_inputs("llava", [[2, "image", 3]] * batch)
            want = generated(model, inputs).sequences
            assert torch.equal(generated(model, inputs).sequences, want)
            held.append((len(fast.graphs), len(fast.llm._caches)))
            assert handle.report().graph_bytes == fast.held_bytes > 0
    assert max(n for n, _ in held) <= 4 and max(n for _, n in held) <= 4
    assert len(fast.graphs) == 0 and not fast.llm._caches


def test_a_longer_text_is_another_bucket_and_still_right() -> None:
    model, _ = llava()
    with vtc.patch(model, "vtc_cls", 6) as handle:
        inputs = [build_inputs("llava", [[n, "image", 4]], seed=n) for n in (3, 19, 20, 60)]
        want = [generated(model, given).sequences for given in inputs]
    with vtc.patch(model, "vtc_cls", 6, fast="eager") as handle:
        lengths = []
        for given, expected in zip(inputs, want, strict=True):
            assert torch.equal(generated(model, given).sequences, expected)
            lengths.append(handle.report().kv_lengths[0])
    texts = [3, 19, 20, 60]
    # the text is brought to a bucket, then the short prompt
    assert lengths == [bucket(-(-(n + 4) // 32) * 32 + 6) for n in texts]


@pytest.mark.parametrize("length", [1, 31, 32, 33, 255, 256, 257, 1024, 1025, 3000])
def test_buckets_hold_what_is_asked_for(length: int) -> None:
    assert length <= bucket(length) < length + 128
    assert bucket(bucket(length)) == bucket(length)


def test_sampled_sequences_are_the_same() -> None:
    model, inputs = llava()
    found = []
    for fast in (False, "eager"):
        with vtc.patch(model, "vtc_cls", 6, fast=fast):  # type: ignore[arg-type]
            torch.manual_seed(3)
            found.append(
                model.generate(
                    **inputs,
                    max_new_tokens=6,
                    do_sample=True,
                    num_return_sequences=3,
                    suppress_tokens=PLACEHOLDERS,
                )
            )
    assert torch.equal(*found)


def test_a_cache_that_is_handed_out_lives_on() -> None:
    model, inputs = llava()
    with vtc.patch(model, "vtc_cls", 6, fast="eager"):
        first = generated(model, inputs)
        keys = [layer.keys.clone() for layer in first.past_key_values.layers]
        generated(model, build_inputs("llava", prompts("llava")["ragged"], seed=9))
        assert all(
            torch.equal(layer.keys, before)
            for layer, before in zip(first.past_key_values.layers, keys, strict=True)
        )
        turns = _second_turn(model, inputs, first)
    with vtc.patch(model, "vtc_cls", 6):
        plain = generated(model, inputs)
        assert torch.equal(_second_turn(model, inputs, plain), turns)


def _second_turn(model: Any, inputs: dict[str, Any], first: Any) -> torch.Tensor:
    """The conversation goes on with two more tokens."""
    said = first.sequences
    ids = torch.cat([said, torch.tensor([[7, 8]]).expand(len(said), -1)], 1)
    more = ids.shape[1] - inputs["input_ids"].shape[1]
    mask = torch.cat([inputs["attention_mask"], torch.ones(len(ids), more)], 1).long()
    out: torch.Tensor = model.generate(
        input_ids=ids,
        attention_mask=mask,
        past_key_values=first.past_key_values,
        max_new_tokens=4,
        do_sample=False,
        suppress_tokens=PLACEHOLDERS,
    )
    return out


@torch.no_grad()
def test_a_forward_hands_out_a_cache_that_goes_on() -> None:
    model, inputs = llava()
    found = []
    for fast in (False, "eager"):
        with vtc.patch(model, "vtc_cls", 6, fast=fast):  # type: ignore[arg-type]
            out = model(**inputs)
            ids = out.logits[:, -1:].argmax(-1)
            mask = torch.cat([inputs["attention_mask"], torch.ones_like(ids)], 1)
            step = model(input_ids=ids, attention_mask=mask, past_key_values=out.past_key_values)
            found.append(step.logits)
    torch.testing.assert_close(*found, atol=2e-5, rtol=1e-4)


@contextmanager
def _hooked(model: Any) -> Iterator[None]:
    layer = model.model.language_model.layers[1]
    handle = layer.register_forward_hook(lambda *given: None)
    try:
        yield
    finally:
        handle.remove()


@contextmanager
def _training(model: Any) -> Iterator[None]:
    model.train()
    try:
        yield
    finally:
        model.eval()


REFUSED: dict[str, tuple[Any, dict[str, Any], str, str]] = {
    "beams": (None, {"num_beams": 2}, "prefill", "beam_search"),
    "hidden states": (None, {"output_hidden_states": True}, "decode", "hidden states"),
    "a cache of the caller's": (None, {"cache_implementation": "static"}, "prefill", "static"),
    "hooks": (_hooked, {}, "prefill", "a hook is attached to a LlamaDecoderLayer"),
    "training": (_training, {}, "encoder", "training mode"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_not_captured_runs_plain_and_says_why(case: str) -> None:
    around, more, part, reason = REFUSED[case]
    model, inputs = llava()
    options = {"max_new_tokens": 5, "do_sample": False, "suppress_tokens": PLACEHOLDERS, **more}
    with vtc.patch(model, "vtc_cls", 6):
        want = model.generate(**inputs, **options)
    with vtc.patch(model, "vtc_cls", 6, fast="eager") as handle:
        if around is None:
            got = model.generate(**inputs, **options)
        else:
            with around(model):
                got = model.generate(**inputs, **options)
        assert reason in handle.report().fast[part]
        # and what can be captured is, in the next calls
        generated(model, inputs)
        generated(model, inputs)
        assert set(handle.report().fast.values()) == {"eager"}
    assert torch.equal(getattr(got, "sequences", got), getattr(want, "sequences", want))


def test_a_decoding_loop_of_the_callers_has_a_cache_of_its_own_making() -> None:
    seen = []

    def loop(model: Any, input_ids: torch.Tensor, **given: Any) -> torch.Tensor:
        seen.append(type(given["past_key_values"]).__name__)
        return model._sample(input_ids, **given)  # type: ignore[no-any-return]

    model, inputs = llava()
    options = {"max_new_tokens": 5, "do_sample": False, "suppress_tokens": PLACEHOLDERS}
    found = []
    for fast in (False, "eager"):
        with vtc.patch(model, "vtc_cls", 6, fast=fast) as handle:  # type: ignore[arg-type]
            found.append(model.generate(**inputs, **options, custom_generate=loop))
    assert torch.equal(*found) and seen == ["DynamicCache"] * 2
    assert "custom_generate" in handle.report().fast["decode"]


def test_without_a_gpu_it_says_so_and_is_right() -> None:
    model, inputs = llava()
    with vtc.patch(model, "vtc_cls", 6):
        want = generated(model, inputs)
    with vtc.patch(model, "vtc_cls", 6, fast=True) as handle:
        got = generated(model, inputs)
        assert set(handle.report().fast.values()) == {"no CUDA device: the model is on cpu"}
        assert handle.report().graph_bytes == 0
        assert "no CUDA device" in str(handle.report())
    assert torch.equal(got.sequences, want.sequences)


def test_gradients_are_left_to_the_plain_path() -> None:
    model, inputs = llava()
    with vtc.patch(model, "vtc_cls", 6, fast="eager") as handle:
        model(**inputs).logits.sum().backward()
        assert "gradients" in handle.report().fast["prefill"]
    assert model.model.multi_modal_projector.linear_1.weight.grad is not None


@pytest.mark.parametrize("first", [torch.no_grad, torch.inference_mode])
def test_modes_without_gradients_may_change_between_calls(first: Any) -> None:
    model, inputs = llava()
    second = torch.inference_mode if first is torch.no_grad else torch.no_grad
    with vtc.patch(model, "vtc_cls", 6, fast="eager"):
        with first():
            a = model(**inputs).logits
        with second():
            b = model(**inputs).logits
        with first():
            sequences = [generated(model, inputs).sequences for _ in range(2)]
        sequences.append(generated(model, inputs).sequences)
    assert torch.equal(a, b)
    assert all(torch.equal(sequences[0], other) for other in sequences)


def test_moved_weights_are_captured_anew() -> None:
    model, inputs = llava()
    with vtc.patch(model, "vtc_cls", 6, fast="eager") as handle:
        generated(model, inputs)
        generated(model, inputs)
        graphs = handle._session.fast.graphs  # type: ignore[union-attr]
        before = graphs.captures
        generated(model, inputs)
        assert graphs.captures == before
        model.double()
        doubled = {name: x.double() if x.is_floating_point() else x for name, x in inputs.items()}
        got = generated(model, doubled)
        assert graphs.captures > before
    with vtc.patch(model, "vtc_cls", 6):
        assert torch.equal(generated(model, doubled).sequences, got.sequences)


class _Nan(Scorer):
    """Scores that are not numbers."""

    name = "nan"

    def __call__(self, tokens: Any) -> torch.Tensor:
        return torch.full(tokens.valid.shape, float("nan"))


def test_checks_of_numbers_are_only_put_off() -> None:
    model, inputs = llava()
    with (
        vtc.patch(model, vtc.method("vtc_cls", scorer=_Nan()), 6, fast="eager"),
        pytest.raises(VtcError, match="NaN scores"),
    ):
        generated(model, inputs)


def test_nothing_stays_behind_an_exception() -> None:
    model, inputs = llava()
    language_model = model.model.language_model

    class Stop(Exception):
        pass

    def stop(ids: Any, scores: Any, **more: Any) -> Any:
        raise Stop

    before = dict(vars(model)), dict(vars(language_model))
    with vtc.patch(model, "vtc_cls", 6, fast="eager"):
        patched = dict(vars(model))
        with pytest.raises(Stop):
            model.generate(**inputs, max_new_tokens=5, logits_processor=[stop])
        assert vars(model).keys() == patched.keys()
        assert vars(language_model).keys() == before[1].keys()
        assert generated(model, inputs).sequences.shape[1] == inputs["input_ids"].shape[1] + 5
    assert vars(model).keys() == before[0].keys()


def test_an_unknown_word_is_refused() -> None:
    model, _ = llava()
    with pytest.raises(OptionError, match="fast='quick' is unknown"):
        vtc.patch(model, "vtc_cls", 6, fast="quick")  # type: ignore[arg-type]
    assert not isinstance(vars(model).get("_vtc_handle"), Method)


def test_sizes_that_never_come_again_leave_nothing() -> None:
    model = build_model("qwen2_vl")
    with vtc.patch(model, "vtc_cls", 0.5, fast="eager") as handle:
        fast = handle._session.fast
        assert fast is not None
        fast.graphs.limit = 3
        for i in range(12):
            inputs = build_inputs("qwen2_vl", [[3, ("image", 8 * (1 + i), 16), 4]], seed=i)
            generated(model, inputs)
            assert "comes again" in handle.report().fast["encoder"]
        tables = (fast.selection._made, fast.encoder._ran, fast.encoder._left)
        assert all(len(table) <= 2 * fast.graphs.limit + 1 for table in tables)
        assert len(fast.graphs) <= 3
        # tensors are among what decisions leave
        assert not fast.selection._made


def test_a_cache_for_which_there_was_no_memory_is_made_anew() -> None:
    from vtc.runtime.static_cache import CountedCache

    class Scarce(torch.Tensor):
        """There is memory for the keys, and none for the values."""

        def new_zeros(self, *size: Any, **options: Any) -> torch.Tensor:
            raise torch.OutOfMemoryError

    model = build_model("llava")
    cache = CountedCache(model.config.text_config, 8, torch.device("cpu"))
    keys, values = torch.randn(2, 1, 2, 3, 16)
    with pytest.raises(torch.OutOfMemoryError):
        cache.update(keys, values.as_subclass(Scarce), 0)
    got = cache.update(keys, values, 0)
    assert torch.equal(got[1][:, :, :3], values)
