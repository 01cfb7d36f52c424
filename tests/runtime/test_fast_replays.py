"""Replays: nothing of a captured function runs again, and what it would not see is noticed."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import nn
from transformers import LogitsProcessor

import vtc
from tests.kit.frozen import frozen
from tests.kit.models import FAMILIES, PLACEHOLDERS, build_model
from tests.kit.prompts import build_inputs, prompts

METHODS: dict[str, tuple[str, Any, dict[str, Any]]] = {
    "vtc_cls": ("vtc_cls", 0.3, {}),
    "todre": ("todre", 0.3, {"stage2": False}),
    "todre, stage 2": ("todre", 0.3, {}),
    "flowcut": ("flowcut", 0.3, {"llm_cut": "off"}),
    "none": ("none", 1.0, {}),
}


@pytest.fixture(autouse=True)
def as_a_graph() -> Iterator[None]:
    with frozen():
        yield


def generated(model: Any, inputs: dict[str, Any], **more: Any) -> Any:
    options = {"max_new_tokens": 4, "do_sample": False, "suppress_tokens": PLACEHOLDERS, **more}
    return model.generate(**inputs, **options, return_dict_in_generate=True, output_logits=True)


def same(got: Any, want: Any) -> None:
    assert torch.equal(got.sequences, want.sequences)
    for a, b in zip(got.logits, want.logits, strict=True):
        torch.testing.assert_close(a, b, atol=2e-5, rtol=1e-4, equal_nan=True)


def ragged(family: str, seed: int = 0) -> dict[str, Any]:
    return build_inputs(family, prompts(family)["ragged"], seed=seed)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("family", [f for f in FAMILIES if f != "llava_onevision"])
def test_replays_take_new_numbers(family: str, method: str) -> None:
    name, keep, options = METHODS[method]
    model = build_model(family)
    inputs = [ragged(family, seed) for seed in (0, 0, 1, 2)]

    def decided(handle: Any) -> tuple[list[torch.Tensor], tuple[int, ...]]:
        chosen = [s.mask() for s in (*handle.token_selections, *handle.selections)]
        return chosen, handle.report().block_patches

    with vtc.patch(model, name, keep, **options) as handle:
        want = [(generated(model, given), *decided(handle)) for given in inputs]
    with vtc.patch(model, name, keep, fast="eager", **options) as handle:
        for given, (answer, chosen, patches) in zip(inputs, want, strict=True):
            same(generated(model, given), answer)
            found, through = decided(handle)
            assert len(found) == len(chosen) and all(map(torch.equal, found, chosen))
            assert through == patches


def test_which_crops_tokens_are_of_is_that_of_the_call() -> None:
    # the encoder is replayed, another picture behind the one it was captured with, and the text is
    # of a bucket that nothing was decided in before
    model = build_model("llava_next")
    square, wide = ("image", 24, 24), ("image", 12, 36)
    rows = [(4, square), (4, square), (4, wide), (40, square), (40, wide), (40, square)]
    inputs = [build_inputs("llava_next", [[n, image, 5]]) for n, image in rows]
    with vtc.patch(model, "hired", 0.4):
        want = [generated(model, given) for given in inputs]
    with vtc.patch(model, "hired", 0.4, fast="eager"):
        for given, answer in zip(inputs, want, strict=True):
            same(generated(model, given), answer)


def prepared(fast: Any = "eager", method: str = "vtc_cls", keep: Any = 0.4) -> tuple[Any, Any, Any]:
    model, inputs = build_model("llava"), ragged("llava")
    return model, inputs, vtc.patch(model, method, keep, fast=fast)


@torch.no_grad()
@pytest.mark.parametrize("method", ["vtc_cls", "todre"])
@pytest.mark.parametrize("family", ["llava", "llava_next", "qwen2_5_vl"])
def test_logits_of_texts_of_one_bucket(family: str, method: str) -> None:
    name, keep, options = METHODS[method]
    model = build_model(family)
    inputs = [build_inputs(family, [[4, "image", n], [2, "image", 3]]) for n in (5, 5, 9, 2)]
    with vtc.patch(model, name, keep, **options):
        want = [model(**given).logits for given in inputs]
    with vtc.patch(model, name, keep, fast="eager", **options) as handle:
        for given, logits in zip(inputs, want, strict=True):
            attended = given["attention_mask"][..., None]
            torch.testing.assert_close(
                model(**given).logits * attended, logits * attended, atol=2e-5, rtol=1e-4
            )
        assert handle._session.fast is not None
        kinds = [key[0] for key in handle._session.fast.graphs._held]  # type: ignore[index]
        assert kinds.count("selection") <= 1


def unlike(module: nn.Module) -> None:
    """Other weights, in other memory."""
    module.weight = nn.Parameter(-2 * module.weight.detach())  # type: ignore[operator]


def elsewhere(weight: nn.Parameter) -> None:
    """The same parameter, with other numbers in other memory."""
    weight.data = -2 * weight.data


def negated(module: nn.Module) -> None:
    """Run by a function of somebody's own."""
    stock = module.forward
    module.forward = functools.wraps(stock)(lambda *given: -stock(*given))  # type: ignore[method-assign]


def anew(parent: nn.Module, name: str) -> None:
    """Another module in the place of one."""
    module = copy.deepcopy(getattr(parent, name))
    elsewhere(next(module.parameters()))
    setattr(parent, name, module)


CHANGES: dict[str, Callable[[Any], Any]] = {
    "projector": lambda m: unlike(m.model.multi_modal_projector.linear_1),
    "embeddings": lambda m: unlike(m.model.language_model.embed_tokens),
    "final norm": lambda m: unlike(m.model.language_model.norm),
    "a layer": lambda m: unlike(m.model.language_model.layers[1].mlp.up_proj),
    "a block": lambda m: unlike(m.model.vision_tower.encoder.layers[2].mlp.fc1),
    "in place": lambda m: m.model.language_model.layers[1].mlp.up_proj.weight.data.mul_(-2),
    "memory of the embeddings": lambda m: elsewhere(m.model.language_model.embed_tokens.weight),
    "memory of the projector": lambda m: elsewhere(m.model.multi_modal_projector.linear_1.weight),
    "memory in a layer": lambda m: elsewhere(m.model.language_model.layers[1].mlp.up_proj.weight),
    "memory in a block": lambda m: elsewhere(m.model.vision_tower.encoder.layers[1].mlp.fc1.weight),
    "other embeddings": lambda m: anew(m.model.language_model, "embed_tokens"),
    "another final norm": lambda m: anew(m.model.language_model, "norm"),
    "another projector": lambda m: anew(m.model, "multi_modal_projector"),
    "rotary frequencies": lambda m: setattr(
        m.model.language_model.rotary_emb,
        "inv_freq",
        m.model.language_model.rotary_emb.inv_freq * 3,
    ),
    "code of a network": lambda m: negated(m.model.language_model.layers[1].mlp),
    "code of a block's network": lambda m: negated(m.model.vision_tower.encoder.layers[1].mlp),
    "code of the projector": lambda m: negated(m.model.multi_modal_projector),
    "hook on the projector": lambda m: m.model.multi_modal_projector.register_forward_hook(
        lambda module, args, out: -out
    ),
    "hook on the tower": lambda m: m.model.vision_tower.register_forward_pre_hook(
        lambda module, args: tuple(-x for x in args)
    ),
    "hook on embeddings": lambda m: m.model.language_model.embed_tokens.register_forward_hook(
        lambda module, args, out: -out
    ),
}


@pytest.mark.parametrize("method", ["vtc_cls", "todre"])
@pytest.mark.parametrize("change", CHANGES)
def test_what_changes_in_the_model_is_noticed(change: str, method: str) -> None:
    model, inputs, handle = prepared(method=method)
    with handle:
        for _ in range(2):
            generated(model, inputs)
        CHANGES[change](model)
        got = generated(model, inputs)
    with vtc.patch(model, method, 0.4):
        same(got, generated(model, inputs))


def test_one_token_is_not_everything() -> None:
    model, inputs, handle = prepared(keep=1)
    with handle:
        for _ in range(2):
            generated(model, inputs)
        handle.set(keep=1.0)
        got = generated(model, inputs)
    same(got, generated(model, inputs))


@pytest.mark.parametrize("method", ["vtc_cls", "todre", "flowcut"])
def test_a_later_turn_with_an_image_has_its_own_signals(method: str) -> None:
    found = []
    for fast in (False, "eager"):
        model, inputs, handle = prepared(fast, method)
        with handle:
            for _ in range(2):
                first = generated(model, inputs)
            more = build_inputs("llava", [[2, "image", 3]] * len(first.sequences), seed=5)
            ids = torch.cat([first.sequences, more["input_ids"]], 1)
            tail = torch.ones(len(ids), ids.shape[1] - inputs["input_ids"].shape[1])
            given = {
                "input_ids": ids,
                "attention_mask": torch.cat([inputs["attention_mask"], tail], 1).long(),
                "pixel_values": more["pixel_values"],
            }
            found.append(generated(model, given, past_key_values=first.past_key_values))
    same(found[1], found[0])


class Asking(LogitsProcessor):
    """Asks the model something else behind the second token."""

    def __init__(self, model: Any, inputs: dict[str, Any]) -> None:
        self.model, self.inputs, self.steps = model, inputs, 0
        self.answer: Any = None

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        self.steps += 1
        if self.steps == 2:
            self.answer = generated(self.model, self.inputs)
        return scores


@pytest.mark.parametrize("method", ["vtc_cls", "todre", "fastv"])
def test_a_generate_within_a_generate(method: str) -> None:
    found = []
    for fast in (False, "eager"):
        model, inputs, handle = prepared(fast, method)
        with handle:
            for _ in range(2):
                asking = Asking(model, ragged("llava", seed=3))
                found.append((generated(model, inputs, logits_processor=[asking]), asking.answer))
            found.append((generated(model, inputs), asking.answer))
    plain = found[:3]
    for got, want in zip(found[3:], plain, strict=True):
        same(got[0], want[0])
        same(got[1], want[1])


def test_guidance_runs_beside_the_prompt() -> None:
    found = []
    for fast in (False, "eager"):
        model, inputs, handle = prepared(fast)
        with handle:
            found += [generated(model, inputs, guidance_scale=1.5) for _ in range(2)]
    same(found[2], found[0])
    same(found[3], found[0])


def test_numbers_that_are_none_are_the_prompts_own() -> None:
    found = []
    for fast in (False, "eager"):
        model, inputs, handle = prepared(fast, "uniform")
        inputs["pixel_values"] = inputs["pixel_values"] * float("nan")
        with handle:
            found.append(generated(model, inputs))
    same(found[1], found[0])


@pytest.mark.parametrize("fast", [False, "eager"])
def test_inference_before_training(fast: Any) -> None:
    model, inputs, handle = prepared(fast)
    with handle:
        with torch.inference_mode():
            model(**inputs)
        model(**inputs).logits.sum().backward()
    assert model.model.multi_modal_projector.linear_1.weight.grad is not None


def test_constants_live_as_long_as_their_graph() -> None:
    model, inputs, handle = prepared()
    with handle:
        for _ in range(2):
            generated(model, inputs)
        graphs = handle._session.fast.graphs  # type: ignore[union-attr]
        held = {id(x) for captured in graphs._held.values() for x in captured.constants}
        used = [c for key, c in graphs._held.items() if key[0] == "selection"]  # type: ignore[index]
    assert held and all(captured.constants for captured in used)


def test_what_somebody_put_in_for_generate_stays() -> None:
    model, inputs, handle = prepared()
    stock, calls = model._prepare_cache_for_generation, []

    def own(*args: Any, **kwargs: Any) -> Any:
        calls.append(args)
        return stock(*args, **kwargs)

    model._prepare_cache_for_generation = own
    with handle:
        for _ in range(2):
            generated(model, inputs)
    assert len(calls) == 2 and model._prepare_cache_for_generation is own


def test_more_sizes_than_are_held_are_not_captured_in_turn() -> None:
    model = build_model("qwen2_vl")
    with vtc.patch(model, "vtc_cls", 0.5, fast="eager") as handle:
        graphs = handle._session.fast.graphs  # type: ignore[union-attr]
        graphs.limit = 8
        for _ in range(3):
            for i in range(6):
                given = build_inputs("qwen2_vl", [[3, ("image", 8 * (1 + i), 16), 4]], seed=i)
                generated(model, given)
        assert graphs.captures <= 4


@pytest.mark.parametrize(("window", "fits"), [(None, True), (70, False)])
def test_windows_that_no_layer_names_are_not_captured(window: int | None, fits: bool) -> None:
    from transformers import MistralConfig

    from vtc.runtime.static_cache import CountedCache

    config = MistralConfig(num_hidden_layers=2, sliding_window=window)
    if getattr(config, "layer_types", None) is not None:
        pytest.skip("this version of transformers names the layers")
    assert CountedCache.fits(config) is fits


def test_hidden_states_that_the_config_asks_for() -> None:
    model, inputs, handle = prepared()
    model.config.text_config.output_hidden_states = True
    with handle, torch.no_grad():
        for _ in range(2):
            out = model(**inputs)
    assert len(out.hidden_states) == 1 + len(model.model.language_model.layers)


@pytest.mark.parametrize("method", ["vtc_cls", "todre"])
def test_adapters_that_are_switched_off(method: str) -> None:
    peft = pytest.importorskip("peft")
    torch.manual_seed(0)
    wrapped = peft.get_peft_model(
        build_model("llava"),
        peft.LoraConfig(target_modules=["up_proj"], init_lora_weights=False, lora_alpha=64),
    ).eval()
    model, inputs = wrapped.get_base_model(), ragged("llava")
    with vtc.patch(model, method, 0.4, fast="eager"):
        for _ in range(2):
            generated(model, inputs)
        with wrapped.disable_adapter():
            got = generated(model, inputs)
    with vtc.patch(model, method, 0.4), wrapped.disable_adapter():
        same(got, generated(model, inputs))
