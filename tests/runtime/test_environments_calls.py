"""Streams, threads, pipelines, wrappers, saving and copying while a model is patched."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from queue import Empty
from threading import Thread
from typing import Any

import pytest
import torch
from PIL import Image
from torch import Tensor, nn

import vtc
from tests.kit.models import PLACEHOLDERS, build_model
from tests.kit.prompts import Inputs, build_inputs
from tests.runtime.test_handle import assert_same, footprint
from vtc.errors import PatchError, UnsupportedModeError, UnsupportedModelError
from vtc.testbed import model_folder

METHODS: dict[str, tuple[float, dict[str, Any]]] = {
    "vtc_cls": (0.4, {}),
    "todre": (0.4, {"tau": 1.1}),  # all is dropped under any tau above 1
    "flowcut": (0.4, {"llm_cut": "on"}),
}
ROWS: list[list[Any]] = [[4, ("image", 24, 24), 5], [2, ("image", 24, 48), 9]]
GREEDY = {"max_new_tokens": 4, "do_sample": False, "suppress_tokens": PLACEHOLDERS}


def patched(model: Any, method: str) -> vtc.Handle:
    keep, options = METHODS[method]
    return vtc.patch(model, method, keep, **options)


@torch.no_grad()
def answers(model: Any, inputs: Inputs) -> list[Tensor]:
    return [model.generate(**inputs, **GREEDY), model(**inputs).logits]


def same(got: list[Tensor], want: list[Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


# a real processor


@pytest.fixture(scope="module")
def testbed() -> tuple[Any, Any]:
    from transformers import AutoModelForImageTextToText, AutoProcessor

    folder = model_folder()
    model = AutoModelForImageTextToText.from_pretrained(folder).eval()
    return model, AutoProcessor.from_pretrained(folder)


@pytest.fixture(scope="module")
def conversation(testbed: tuple[Any, Any]) -> list[dict[str, Any]]:
    size = testbed[1].image_processor.crop_size
    noise = torch.randint(
        0, 256, (size["height"], size["width"], 3), generator=torch.Generator().manual_seed(0)
    )
    image = Image.fromarray(noise.to(torch.uint8).numpy())
    words = [w for w in testbed[1].tokenizer.get_vocab() if w.isalpha()][:5]
    content = [{"type": "image", "image": image}, {"type": "text", "text": " ".join(words)}]
    return [{"role": "user", "content": content}]


@pytest.fixture(scope="module")
def prompt(testbed: tuple[Any, Any], conversation: list[dict[str, Any]]) -> dict[str, Tensor]:
    return testbed[1].apply_chat_template(
        conversation,
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
        add_generation_prompt=True,
    )


# as many tokens as asked for, none of them special
def options_of(processor: Any) -> dict[str, Any]:
    return {
        "max_new_tokens": 8,
        "min_new_tokens": 8,
        "do_sample": False,
        "suppress_tokens": processor.tokenizer.all_special_ids,
    }


@pytest.mark.parametrize("method", METHODS)
def test_streamed_text_is_the_decoded_one(
    testbed: tuple[Any, Any], prompt: dict[str, Tensor], method: str
) -> None:
    from transformers import TextIteratorStreamer

    model, processor = testbed
    options = options_of(processor)
    with patched(model, method) as handle:
        out = model.generate(**prompt, **options)
        new = out[:, prompt["input_ids"].shape[1] :]
        (want,) = processor.batch_decode(new, skip_special_tokens=True)
        for skip_prompt in (True, False):
            streamer = TextIteratorStreamer(
                processor.tokenizer, skip_prompt, timeout=60, skip_special_tokens=True
            )
            thread = Thread(
                target=model.generate, kwargs={**prompt, **options, "streamer": streamer}
            )
            thread.start()
            text = list(streamer)
            thread.join()
            (whole,) = processor.batch_decode(out, skip_special_tokens=True)
            assert "".join(text).split() == (want if skip_prompt else whole).split()
            assert len(text) > 4 and want
        assert handle.report().kept_fraction < 1


@pytest.mark.parametrize("method", METHODS)
def test_a_stream_whose_thread_fails(
    testbed: tuple[Any, Any], prompt: dict[str, Tensor], method: str
) -> None:
    from transformers import TextIteratorStreamer

    model, processor = testbed
    options, errors = options_of(processor), []
    model.generate(**prompt, **options)
    before = footprint(model)

    def fail(ids: Tensor, scores: Tensor, **_: Any) -> Tensor:
        if ids.shape[1] > prompt["input_ids"].shape[1] + 2:
            raise RuntimeError("broken on purpose")
        return torch.zeros(len(ids), dtype=torch.bool)

    def run(streamer: Any) -> None:
        try:
            model.generate(**prompt, **options, streamer=streamer, stopping_criteria=[fail])
        except RuntimeError as error:
            errors.append(str(error))

    with patched(model, method):
        want = model.generate(**prompt, **options)
        streamer = TextIteratorStreamer(processor.tokenizer, skip_prompt=True, timeout=1)
        thread = Thread(target=run, args=(streamer,))
        thread.start()
        with pytest.raises(Empty):
            list(streamer)
        thread.join()
        assert errors == ["broken on purpose"]
        assert torch.equal(model.generate(**prompt, **options), want)
    assert_same(footprint(model), before)


@pytest.mark.parametrize("method", METHODS)
def test_a_pipeline_answers_as_the_patched_model(
    testbed: tuple[Any, Any],
    conversation: list[dict[str, Any]],
    prompt: dict[str, Tensor],
    method: str,
) -> None:
    from transformers import pipeline

    model, processor = testbed
    options = options_of(processor)
    ask = pipeline("image-text-to-text", model=model, processor=processor)
    with patched(model, method) as handle:
        out = model.generate(**prompt, **options)
        want, report = processor.batch_decode(out[:, prompt["input_ids"].shape[1] :]), handle.report
        tokens = report().kept_tokens
        handle.set(keep=1)
        (answer,) = ask(text=conversation, generate_kwargs=options, return_full_text=False)
        assert report().llm_tokens != tokens
        handle.set(keep=METHODS[method][0])
        (answer,) = ask(text=conversation, generate_kwargs=options, return_full_text=False)
        assert report().kept_tokens == tokens
    assert answer["generated_text"].split() == want[0].split()


# threads


def together(*calls: Callable[[], list[Tensor]], times: int = 6) -> list[list[list[Tensor]]]:
    """The results of these calls, each in a thread of its own that repeats it."""
    with ThreadPoolExecutor(len(calls)) as pool:
        jobs = [pool.submit(lambda c=call: [c() for _ in range(times)]) for call in calls]
        return [job.result() for job in jobs]


@pytest.mark.parametrize(
    "first, second",
    [
        (("llava", "vtc_cls"), ("qwen3_vl", "flowcut")),
        (("llava", "flowcut"), ("internvl", "todre")),
        (("qwen2_5_vl", "flowcut"), ("qwen2_5_vl", None)),
        (("llava", "todre"), ("llava", None)),
    ],
)
def test_two_models_in_two_threads(first: tuple[str, str], second: tuple[str, str | None]) -> None:
    """Of several families and methods; or one of them stock."""
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    names = set(ALL_ATTENTION_FUNCTIONS.keys())
    calls = []
    for family, method in (first, second):
        model, inputs = build_model(family), build_inputs(family, ROWS)
        if method is not None:
            patched(model, method)
        calls.append(lambda m=model, i=inputs: answers(m, i))
    wanted = [call() for call in calls]
    for found, want in zip(together(*calls), wanted, strict=True):
        assert all(same(got, want) for got in found)
    assert set(ALL_ATTENTION_FUNCTIONS.keys()) == names


@pytest.mark.parametrize("method", METHODS)
def test_one_model_in_several_threads(method: str) -> None:
    """Its calls wait for one another."""
    model, calls = build_model("qwen3_vl"), []
    patched(model, method)
    for seed in range(3):
        inputs = build_inputs("qwen3_vl", ROWS, seed)
        calls.append(lambda i=inputs: [model.generate(**i, **GREEDY)])
    wanted = [call() for call in calls]
    for found, want in zip(together(*calls, times=4), wanted, strict=True):
        assert all(same(got, want) for got in found)


def forget_static_cache(model: Any) -> None:
    """Stock generate keeps how long one was on the model."""
    for name in ("_cache", "_previous_max_cache_length"):
        vars(model).pop(name, None)


@pytest.mark.parametrize(
    "options",
    [{}, {"num_beams": 2}, {"cache_implementation": "static"}, {"prompt_lookup_num_tokens": 2}],
    ids=["dynamic", "beams", "static", "lookup"],
)
@pytest.mark.parametrize("method", METHODS)
def test_removing_the_patch_during_a_generate_of_another_thread(
    method: str, options: dict[str, Any]
) -> None:
    """Which goes on as it began: a cache of unequal lengths needs masks of its own."""
    rows = ROWS[:1] if "prompt_lookup_num_tokens" in options else ROWS
    model, inputs = build_model("llava"), build_inputs("llava", rows)
    given: dict[str, Any] = {**inputs, **GREEDY, **options, "max_new_tokens": 6}
    model.generate(**given)
    stock = answers(model, inputs)
    forget_static_cache(model)
    before = footprint(model)
    with patched(model, method):
        want = model.generate(**given)
    handle, steps = patched(model, method), []

    def remove(ids: Tensor, scores: Tensor, **_: Any) -> Tensor:
        steps.append(ids)
        if len(steps) == 2:
            thread = Thread(target=handle.remove)
            thread.start()
            thread.join(60)
            assert not thread.is_alive()
            with pytest.raises(PatchError, match="is not patched"):
                vtc.unpatch(model)
        return torch.zeros(len(ids), dtype=torch.bool)

    got = model.generate(**given, stopping_criteria=[remove])
    assert len(steps) > 1 and torch.equal(got, want)
    forget_static_cache(model)
    assert_same(footprint(model), before)
    assert same(answers(model, inputs), stock)


# saving and copying


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("method", METHODS)
def test_what_is_saved_is_the_stock_model(method: str, dtype: torch.dtype, tmp_path: Path) -> None:
    from transformers import LlavaForConditionalGeneration

    model = build_model("llava").to(dtype)
    model.generation_config.max_new_tokens = 7
    inputs = build_inputs("llava", ROWS)
    inputs["pixel_values"] = inputs["pixel_values"].to(dtype)
    stock = answers(model, inputs)
    model.save_pretrained(tmp_path / "stock")
    state = {name: weight.clone() for name, weight in model.state_dict().items()}
    with patched(model, method):
        answers(model, inputs)
        model.save_pretrained(tmp_path / "patched")
        found = model.state_dict()
    assert found.keys() == state.keys()
    assert all(torch.equal(found[name], weight) for name, weight in state.items())
    files = {path.name: path.read_bytes() for path in (tmp_path / "stock").iterdir()}
    assert files == {path.name: path.read_bytes() for path in (tmp_path / "patched").iterdir()}
    assert {"config.json", "generation_config.json", "model.safetensors"} <= files.keys()
    assert not any(b"vtc" in content for name, content in files.items() if name.endswith("json"))
    loaded = [
        LlavaForConditionalGeneration.from_pretrained(tmp_path / name, dtype=dtype).eval()
        for name in ("stock", "patched")
    ]
    assert loaded[1].generation_config.max_new_tokens == 7
    assert same(answers(loaded[1], inputs), answers(loaded[0], inputs))
    assert same(answers(model, inputs), stock)


@pytest.mark.parametrize("method", METHODS)
def test_copies_of_a_patched_model_are_refused(method: str) -> None:
    model, inputs = build_model("llava"), build_inputs("llava", ROWS)
    stock = answers(model, inputs)
    handle, before = patched(model, method), None
    want = answers(model, inputs)
    for part in (model, model.model, model.model.language_model):
        for duplicate in (copy.deepcopy, pickle.dumps, lambda m: torch.save(m, io.BytesIO())):
            before = footprint(model)
            with pytest.raises(PatchError, match="was to be copied or pickled"):
                duplicate(part)
            assert_same(footprint(model), before)
            assert same(answers(model, inputs), want)
    twin = build_model("llava", seed=3)
    twin.load_state_dict(model.state_dict())
    handle.remove()
    for other in (twin, copy.deepcopy(model)):
        assert same(answers(other, inputs), stock)


# wrappers


def test_wrappers_are_refused_with_the_model_to_patch() -> None:
    model, inputs = build_model("llava"), build_inputs("llava", ROWS)
    for wrapper, inside in (
        (torch.compile(model, backend="eager"), "model._orig_mod"),
        (nn.DataParallel(model), "model.module"),
    ):
        with pytest.raises(UnsupportedModelError, match=rf"vtc\.patch\({inside}"):
            patched(wrapper, "vtc_cls")
        with pytest.raises(PatchError, match="is not patched"):
            vtc.unpatch(wrapper)
    with patched(model, "vtc_cls"):
        want = answers(model, inputs)
        with torch.no_grad():
            # without several devices it calls the model itself
            assert torch.equal(nn.DataParallel(model)(**inputs).logits, want[1])
        assert torch.equal(torch.compile(model).generate(**inputs, **GREEDY), want[0])


def test_replicas_of_data_parallel_are_refused() -> None:
    """They would share one patch, in several threads at a time."""
    model, inputs = build_model("llava"), build_inputs("llava", ROWS)
    with patched(model, "vtc_cls"):
        want = answers(model, inputs)
        replica = model.model._replicate_for_data_parallel()
        with pytest.raises(UnsupportedModeError, match="replica of a patched model"):
            replica(**inputs)
        assert same(answers(model, inputs), want)


# host logic between compiled parts: the clock, for one
@pytest.mark.filterwarnings("ignore:Dynamo does not know how to trace:UserWarning")
@pytest.mark.slow
@pytest.mark.parametrize("patch_first", [True, False])
def test_a_compiled_forward_of_a_patched_model(patch_first: bool) -> None:
    model, inputs = build_model("llava"), build_inputs("llava", ROWS)
    with torch.no_grad():
        stock = model(**inputs).logits
        compiled = torch.compile(model, backend="eager")
        if not patch_first:
            compiled(**inputs)
        with patched(model, "vtc_cls") as handle:
            want = model(**inputs).logits
            assert torch.allclose(compiled(**inputs).logits, want, atol=1e-5)
            assert handle.report().kept_fraction < 1
        assert torch.allclose(compiled(**inputs).logits, stock, atol=1e-5)


@pytest.mark.parametrize("family", ["llava", "qwen2_5_vl", "internvl"])
@pytest.mark.parametrize("method", METHODS)
def test_eager_attention(family: str, method: str) -> None:
    inputs, found = build_inputs(family, ROWS), []
    for implementation in ("eager", "sdpa"):
        model = build_model(family)
        model.set_attn_implementation(implementation)
        with patched(model, method) as handle:
            found.append((answers(model, inputs), handle.selections))
        assert {m.config._attn_implementation for m in model.modules() if hasattr(m, "config")} == {
            implementation
        }
    (eager, chosen), (sdpa, wanted) = found
    assert torch.equal(eager[0], sdpa[0])
    assert torch.allclose(eager[1], sdpa[1], rtol=0, atol=1e-5)
    assert same([s.keep for s in chosen], [s.keep for s in wanted])
