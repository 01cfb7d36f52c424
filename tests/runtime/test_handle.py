"""What is attached to a model is detached, bit by bit, also after an exception."""

from __future__ import annotations

import copy
import gc
import io
import json
import pickle
import weakref
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

import vtc
from vtc.errors import PatchError


def footprint(model: Any) -> dict[str, Any]:
    """Everything about a model that a patch could leave traces on."""
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    hooks = {
        name: [len(getattr(module, kind)) for kind in vars(module) if kind.endswith("_hooks")]
        for name, module in model.named_modules()
    }
    return {
        "hooks": hooks,
        "own": {
            name: {key: id(value) for key, value in vars(module).items()}
            for name, module in model.named_modules()
        },
        "configs": {
            name: id(getattr(module, "config", None)) for name, module in model.named_modules()
        },
        "config": model.config.to_dict(),
        "generation": model.generation_config.to_dict(),
        "forward": {name: module.forward.__func__ for name, module in model.named_modules()},
        "state": {name: tensor.clone() for name, tensor in model.state_dict().items()},
        "implementations": {
            name: module.config._attn_implementation
            for name, module in model.named_modules()
            if hasattr(module, "config")
        },
        "attention": {name: id(function) for name, function in ALL_ATTENTION_FUNCTIONS.items()},
    }


def assert_same(a: dict[str, Any], b: dict[str, Any]) -> None:
    state_a, state_b = a.pop("state"), b.pop("state")
    assert a == b
    assert state_a.keys() == state_b.keys()
    assert all(torch.equal(state_a[name], state_b[name]) for name in state_a)


@pytest.fixture
def used(llava: Any, make_inputs: Any) -> tuple[Any, dict[str, torch.Tensor]]:
    """A model that has run before: transformers installs its own capturing hooks at the first
    call."""
    inputs = make_inputs([[4, None, 5], [2, None, 9]])
    llava.generate(**inputs, max_new_tokens=2, do_sample=False, use_cache=True)
    return llava, inputs


@pytest.mark.parametrize(
    "method, keep", [("vtc_cls", 0.3), ("random", 4), ("downsample", 9), ("average_pool", 9)]
)
def test_unpatch_leaves_no_trace(used: Any, method: str, keep: float) -> None:
    model, inputs = used
    before, want = footprint(model), model(**inputs).logits
    vtc.patch(model, method, keep)
    model.generate(**inputs, max_new_tokens=3, do_sample=False, suppress_tokens=[90])
    model(**inputs)
    vtc.unpatch(model)
    assert_same(footprint(model), before)
    assert torch.equal(model(**inputs).logits, want)


@pytest.mark.parametrize("where", ["language_model", "vision_tower", "select"])
@pytest.mark.parametrize("call", ["generate", "forward", "lookup"])
def test_an_exception_inside_a_call_leaves_no_trace(
    used: Any, monkeypatch: pytest.MonkeyPatch, where: str, call: str
) -> None:
    model, inputs = used
    if call == "lookup":
        inputs = {name: tensor[:1] for name, tensor in inputs.items()}
    before, want = footprint(model), model(**inputs).logits

    def broken(*args: Any, **kwargs: Any) -> Any:
        raise RuntimeError("broken on purpose")

    def run() -> Any:
        if call == "forward":
            return model(**inputs)
        options = {"prompt_lookup_num_tokens": 2} if call == "lookup" else {}
        return model.generate(**inputs, max_new_tokens=3, do_sample=False, **options)

    with (
        pytest.raises(RuntimeError, match="on purpose"),
        vtc.patch(model, "vtc_cls", 0.3) as handle,
    ):
        if where == "select":
            monkeypatch.setattr(type(handle.method), "select", broken)
        else:
            layer = getattr(model.model, where)
            layer = layer.layers[1] if where == "language_model" else layer.encoder.layers[4]
            # an attribute of the instance: older pytest would leave one behind in undoing it
            monkeypatch.setitem(vars(layer.mlp), "forward", broken)
        run()
    monkeypatch.undo()
    assert_same(footprint(model), before)
    assert torch.equal(model(**inputs).logits, want)


def test_a_failed_call_does_not_disturb_the_next(
    used: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, inputs = used

    def broken(*args: Any, **kwargs: Any) -> Any:
        raise RuntimeError("broken on purpose")

    with vtc.patch(model, "vtc_cls", 0.3):
        want = model.generate(**inputs, max_new_tokens=4, do_sample=False), model(**inputs).logits
        with monkeypatch.context() as m:
            m.setattr(model.model.language_model.layers[0], "forward", broken)
            for run in (
                lambda: model(**inputs),
                lambda: model.generate(**inputs, max_new_tokens=4),
            ):
                with pytest.raises(RuntimeError, match="on purpose"):
                    run()
        got = model.generate(**inputs, max_new_tokens=4, do_sample=False), model(**inputs).logits
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


def test_remove_is_idempotent_and_keeps_the_record(used: Any) -> None:
    model, inputs = used
    handle = vtc.patch(model, "vtc_cls", 5)
    model.generate(**inputs, max_new_tokens=3, do_sample=False)
    handle.remove()
    handle.remove()
    assert handle.selections[0].keep.shape == (2, 5)
    assert handle.report().llm_tokens == (5, 5)
    second = vtc.patch(model, "random", 3)
    handle.remove()  # an old handle must not undo a newer patch
    model.generate(**inputs, max_new_tokens=1, do_sample=False)
    assert second.report().llm_tokens == (3, 3)
    second.remove()


def test_an_override_of_generate_that_was_there_before_comes_back(used: Any) -> None:
    model, inputs = used
    calls = []
    stock = model.generate
    model.generate = lambda **kwargs: calls.append(1) or stock(**kwargs)
    mine = model.generate
    with vtc.patch(model, "vtc_cls", 5):
        model.generate(**inputs, max_new_tokens=1, do_sample=False)
    assert model.generate is mine
    assert calls == [1]


def test_set_changes_the_budget_without_patching_again(used: Any) -> None:
    model, inputs = used
    with vtc.patch(model, "vtc_cls", 5) as handle:
        for keep, count in [(0.5, 18), (1, 1), (1.0, 36), (7, 7)]:
            handle.set(keep=keep)
            model.generate(**inputs, max_new_tokens=1, do_sample=False)
            assert handle.report().llm_tokens == (count, count)


def test_a_removed_handle_has_no_budget_to_set(used: Any) -> None:
    model, _ = used
    with vtc.patch(model, "vtc_cls", 5) as handle:
        pass
    with (
        vtc.patch(model, "vtc_cls", 6),
        pytest.raises(PatchError, match="keep=7 was set on a handle that was removed"),
    ):
        handle.set(keep=7)


def test_a_patched_model_can_be_collected(make_llava: Any) -> None:
    model = make_llava()
    vtc.patch(model, "vtc_cls", 5)
    gone = weakref.ref(model)
    del model
    gc.collect()
    assert gone() is None


def test_report_before_any_call(llava: Any) -> None:
    with vtc.patch(llava, "vtc_cls", 5) as handle:
        assert handle.selections == []
        with pytest.raises(PatchError, match="no call with images"):
            handle.report()


def test_report_counts_and_times(used: Any) -> None:
    model, inputs = used
    with vtc.patch(model, "vtc_cls", 0.25, positions="renumber") as handle:
        model.generate(**inputs, max_new_tokens=4, min_new_tokens=4, do_sample=False)
    report = handle.report()
    assert (report.visual_tokens, report.llm_tokens) == ((36, 36), (9, 9))
    assert report.kept_fraction == 0.25
    assert report.new_tokens == 4
    # 2 rows × (9 image + longest text of 11) × 64 wide × 4 layers × keys and values × 4 bytes
    assert report.kv_bytes == 2 * (9 + 11) * 64 * 4 * 2 * 4
    assert 0 < report.encoder_ms < report.ttft_ms
    assert 0 < report.selector_ms < report.ttft_ms
    assert report.tpot_ms > 0
    assert report.positions == "renumber"
    assert set(report.to_dict()["kernels"].values()) == {"torch"}
    assert "kept fraction" in str(report)


def test_pipeline_is_compressed(llava: Any, processor: Any, oracle: Any) -> None:
    """The image-text-to-text pipeline calls the instance's generate with the processor's inputs."""
    from transformers import pipeline

    noise = torch.randint(
        0, 256, (24, 24, 3), generator=torch.Generator().manual_seed(0), dtype=torch.uint8
    )
    image = Image.fromarray(noise.numpy())
    content = [{"type": "image", "image": image}, {"type": "text", "text": "w5 w17 w33"}]
    messages = [{"role": "user", "content": content}]
    inputs = processor.apply_chat_template(
        messages, tokenize=True, return_dict=True, return_tensors="pt"
    )
    options = {"max_new_tokens": 6, "do_sample": False, "suppress_tokens": [90]}
    ask = pipeline("image-text-to-text", model=llava, processor=processor)
    with vtc.patch(llava, "vtc_cls", 0.2) as handle:
        (answer,) = ask(text=messages, generate_kwargs=options, return_full_text=False)
    out = llava.generate(**oracle(inputs, handle.selections[0]), **options)
    want = processor.decode(out[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    assert answer["generated_text"].split() == want.split()
    assert handle.report().llm_tokens == (7,)
    whole = llava.generate(**inputs, **options)
    assert not torch.equal(whole, out), (
        "nothing that was dropped mattered: the comparison shows nothing"
    )


def test_report_is_of_the_last_call(used: Any) -> None:
    model, inputs = used
    text = {"input_ids": torch.tensor([[5, 6, 7]])}
    with vtc.patch(model, "vtc_cls", 0.25) as handle:
        for call in (lambda given: model.generate(**given, max_new_tokens=1), lambda g: model(**g)):
            call(inputs)
            handle.set(keep=0.5)
            assert handle.report().keep == 0.25  # what that call kept
            call(inputs)
            assert handle.report().keep == 0.5
            handle.set(keep=0.25)
            call(text)
            assert handle.selections == []
            with pytest.raises(PatchError, match="no call with images to report on"):
                handle.report()
            call(inputs)
            with pytest.raises(vtc.VtcError):
                call(inputs | {"pixel_values": inputs["pixel_values"][0]})
            assert handle.selections == []


def test_report_of_a_direct_forward(used: Any) -> None:
    model, inputs = used
    for keep in (0.25, 1.0):
        with vtc.patch(model, "vtc_cls", keep) as handle:
            out = model(**inputs, use_cache=True)
            report = handle.report()
            # a later step of an own loop is part of the same call
            step = {"input_ids": torch.tensor([[5], [6]]), "past_key_values": out.past_key_values}
            model(**step)
            assert handle.report() == report
        assert report.new_tokens is None and report.tpot_ms is None
        assert report.ttft_ms > (report.encoder_ms or 0)
        length = inputs["input_ids"].shape[1] - 36 + round(36 * keep)
        assert report.kv_bytes == 2 * length * 64 * 4 * 2 * 4


def test_report_of_an_early_end(used: Any) -> None:
    model, inputs = used
    inputs = {name: tensor[:1] for name, tensor in inputs.items()}
    with vtc.patch(model, "vtc_cls", 0.25) as handle:
        out = model.generate(**inputs, max_new_tokens=12, do_sample=False, suppress_tokens=[90])
        new = out[0, -12:].tolist()
        model.generate(
            **inputs, max_new_tokens=12, do_sample=False, suppress_tokens=[90], eos_token_id=new[4]
        )
    assert handle.report().new_tokens == new.index(new[4]) + 1 < 12
    json.dumps(handle.report().to_dict())


def test_a_copy_of_a_patched_model_is_refused(used: Any) -> None:
    """It would run the original's generate on its own weights, or the other way round."""
    model, inputs = used
    want = model.generate(**inputs, max_new_tokens=2, do_sample=False)
    with vtc.patch(model, "vtc_cls", 0.3):
        model.generate(**inputs, max_new_tokens=1)
        for duplicate in (copy.deepcopy, pickle.dumps, lambda m: torch.save(m, io.BytesIO())):
            with pytest.raises(PatchError, match="was to be copied or pickled"):
                duplicate(model)
    twin = copy.deepcopy(model)
    assert torch.equal(twin.generate(**inputs, max_new_tokens=2, do_sample=False), want)


def test_saving_a_patched_model_saves_the_stock_one(used: Any, tmp_path: Path) -> None:
    model, inputs = used
    model.save_pretrained(tmp_path / "stock")
    with vtc.patch(model, "vtc_cls", 0.3):
        model.generate(**inputs, max_new_tokens=1)
        model.save_pretrained(tmp_path / "patched")
    files = {path.name: path.read_bytes() for path in (tmp_path / "stock").iterdir()}
    assert files == {path.name: path.read_bytes() for path in (tmp_path / "patched").iterdir()}


def test_removing_while_a_generate_is_running(used: Any) -> None:
    """A consumer of a stream leaves the context before the generating thread has returned."""
    from transformers.generation.streamers import BaseStreamer

    model, inputs = used
    inputs = {name: tensor[:1] for name, tensor in inputs.items()}
    before = footprint(model)
    for options in ({}, {"prompt_lookup_num_tokens": 2}):
        handle = vtc.patch(model, "vtc_cls", 0.3)

        class Leaving(BaseStreamer):
            def put(self, value: torch.Tensor) -> None:
                pass

            def end(self, leave: Any = handle.remove) -> None:
                leave()

        model.generate(**inputs, max_new_tokens=2, do_sample=False, streamer=Leaving(), **options)
        assert_same(footprint(model), dict(before))
        assert handle.report().llm_tokens == (11,)


def test_what_others_put_around_generate_stays_theirs(used: Any) -> None:
    model, inputs = used
    options = {"max_new_tokens": 3, "do_sample": False, "suppress_tokens": [90]}
    before, want = footprint(model), model.generate(**inputs, **options)
    handle = vtc.patch(model, "vtc_cls", 0.3)
    inner = model.generate
    model.generate = outer = lambda **kwargs: inner(**kwargs)
    assert not torch.equal(model.generate(**inputs, **options), want)
    handle.remove()
    assert model.generate is outer
    # a function kept beyond the patch is stock
    assert torch.equal(model.generate(**inputs, **options), want)
    del model.generate
    assert_same(footprint(model), before)


def test_two_models_in_two_threads(make_llava: Any, make_inputs: Any) -> None:
    inputs = make_inputs([[4, None, 5], [2, None, 9]])
    options = {"max_new_tokens": 6, "do_sample": False, "suppress_tokens": [90]}
    models = [make_llava(seed=seed) for seed in (0, 1)]

    def answers(model: Any) -> list[torch.Tensor]:
        return [model.generate(**inputs, **options), model(**inputs).logits]

    for model in models:
        vtc.patch(model, "vtc_cls", 0.3)
    want = [answers(model) for model in models]
    with ThreadPoolExecutor(4) as pool:
        # generate of one model may be called from several threads too; a direct forward may not
        twice = [model for model in models for _ in range(6)]
        generated = list(pool.map(lambda m: m.generate(**inputs, **options), twice))
        both = list(pool.map(answers, models))
    for model, expected in zip(models, want, strict=True):
        found = [g for g, m in zip(generated, twice, strict=True) if m is model]
        assert all(torch.equal(g, expected[0]) for g in found)
    for got, expected in zip(both, want, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))


@pytest.mark.parametrize("call", ["greedy", "beams", "lookup"])
def test_an_exception_in_a_later_step_leaves_no_trace(used: Any, call: str) -> None:
    model, inputs = used
    if call == "lookup":
        inputs = {name: tensor[:1] for name, tensor in inputs.items()}
    options = {"greedy": {}, "beams": {"num_beams": 2}, "lookup": {"prompt_lookup_num_tokens": 2}}
    before, steps = footprint(model), []

    def criterion(ids: torch.Tensor, scores: torch.Tensor, **_: Any) -> torch.Tensor:
        steps.append(ids)
        if len(steps) == 2:
            raise RuntimeError("broken on purpose")
        return torch.zeros(len(ids), dtype=torch.bool)

    with pytest.raises(RuntimeError, match="on purpose"), vtc.patch(model, "vtc_cls", 0.3):
        model.generate(
            **inputs,
            max_new_tokens=9,
            do_sample=False,
            stopping_criteria=[criterion],
            **options[call],
        )
    assert_same(footprint(model), before)


# older stock versions compare the device of ids with that of offloaded weights
@pytest.mark.filterwarnings("ignore:You are calling .generate:UserWarning")
@pytest.mark.parametrize("offload", [False, True])
def test_models_that_accelerate_dispatched(
    make_llava: Any, make_inputs: Any, offload: bool
) -> None:
    from accelerate import cpu_offload, dispatch_model

    inputs, model = make_inputs([[4, None, 5], [2, None, 9]]), make_llava()

    def answers(given: Any) -> list[torch.Tensor]:
        with vtc.patch(given, "vtc_cls", 0.3), torch.no_grad():
            generated = given.generate(**inputs, max_new_tokens=4, do_sample=False)
            return [generated, given(**inputs).logits]

    want = answers(model)
    if offload:
        placed = cpu_offload(model, execution_device="cpu")
        with (
            vtc.patch(placed, "downsample", 9),
            pytest.raises(vtc.errors.UnsupportedModeError, match="weights are offloaded"),
        ):
            placed.generate(**inputs, max_new_tokens=1)
    else:
        placed = dispatch_model(model, {"": "cpu"}, force_hooks=True)
    assert all(torch.equal(a, b) for a, b in zip(answers(placed), want, strict=True))
