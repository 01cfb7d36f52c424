"""What the seam between decoder layers leaves behind, and what it refuses."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.kit.layers import (
    Scripted,
    cutting,
    generated,
    keeping,
    model_of,
    placed_in,
    seam_on,
)
from tests.kit.models import build_model
from tests.kit.prompts import PROMPTS, build_inputs
from vtc.errors import InputError, PatchError, SignalError, UnsupportedModeError, VtcError
from vtc.sites import LayerView
from vtc.types import Budget

pytestmark = pytest.mark.filterwarnings("ignore:.*(do_sample|max_length|use_cache).*")

MIXED = "mixed: two images, one image, text only"


def test_a_static_cache_that_is_used_again_forgets() -> None:
    from transformers import StaticCache

    placed = placed_in("llava", model_of("llava"), build_inputs("llava", PROMPTS["batch 1"]))
    text = torch.arange(3, 40)[None]
    with cutting("llava", Scripted({1: keeping(placed, 0.3)}), (1,), PROMPTS["batch 1"]) as run:
        cached = StaticCache(run.model.model.language_model.config, max_cache_len=80)
        run.model(**run.inputs, past_key_values=cached)
        cached.reset()
        run.announced = False
        options = {"max_new_tokens": 5, "do_sample": False}
        got = run.model.generate(text, past_key_values=cached, **options)
    assert torch.equal(got, run.model.generate(text, **options))


def traces(model: Any) -> Any:
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    modules = list(model.modules())
    return (
        [(len(m._forward_pre_hooks), len(m._forward_hooks)) for m in modules],
        [id(vars(m).get("config")) for m in modules],
        [list(vars(m)) for m in modules],
        sorted(ALL_ATTENTION_FUNCTIONS.keys()),
    )


class Broken(Exception):
    pass


@pytest.mark.parametrize("kind", [Broken, KeyboardInterrupt])
def test_a_broken_choice_leaves_nothing(kind: type[BaseException]) -> None:
    model = model_of("llava")
    inputs = build_inputs("llava", PROMPTS[MIXED])
    with torch.no_grad():
        want = model(**inputs).logits
    before = traces(model)

    class Breaks(Scripted):
        def layer_cut(self, view: LayerView, budget: Budget) -> Tensor:
            raise kind("no")

    with cutting("llava", Breaks({}), (1,), PROMPTS[MIXED]) as run, torch.no_grad():
        attached = traces(model)
        with pytest.raises(kind):
            model(**inputs)
        if kind is Broken:
            assert traces(model) == attached
        run.announced = False
        model.model.language_model(inputs_embeds=torch.zeros(1, 3, 64))
        assert traces(model) == attached
        run.seam.attach()
        assert traces(model) == attached
    assert traces(model) == before
    with torch.no_grad():
        assert torch.equal(model(**inputs).logits, want)


@pytest.mark.parametrize("keep", [torch.ones(3, 7, dtype=torch.bool), torch.ones(3, 36), None])
def test_a_choice_of_another_shape_is_refused(keep: Any) -> None:
    class Wrong(Scripted):
        def layer_cut(self, view: LayerView, budget: Budget) -> Tensor:
            return keep

    with (
        cutting("llava", Wrong({}), (1,), PROMPTS[MIXED]) as run,
        pytest.raises(VtcError, match="expected a tensor of bool"),
    ):
        run.model(**run.inputs)


def test_layers_that_cannot_be_cut_after_are_refused() -> None:
    with pytest.raises(SignalError, match=r"expected layers 0\.\.2"):
        seam_on(model_of("llava"), Scripted({}), (3,))
    with pytest.raises(SignalError, match="expected layer 1 or later"):
        seam_on(model_of("qwen3_vl"), Scripted({}), (0, 2))
    model = build_model("llava")
    model.model.language_model.config.sliding_window = 16
    with pytest.raises(UnsupportedModeError, match="slides over 16"):
        seam_on(model, Scripted({}), (1,))
    seam_on(model, Scripted({}), ())


def test_training_with_checkpoints_is_refused() -> None:
    model = build_model("llava").train()
    model.gradient_checkpointing_enable()
    with (
        cutting("llava", Scripted({}), (1,), PROMPTS[MIXED], model) as run,
        pytest.raises(UnsupportedModeError, match="gradient checkpointing"),
    ):
        run.model(**run.inputs)


def test_a_prompt_in_pieces_is_refused() -> None:
    with (
        cutting("llava", Scripted({}), (1,), PROMPTS["batch 1"]) as run,
        pytest.raises(UnsupportedModeError, match="prefill_chunk_size"),
    ):
        generated(run, prefill_chunk_size=8)


def test_what_a_cut_cache_cannot_go_through_is_refused() -> None:
    placed = placed_in("llava", model_of("llava"), build_inputs("llava", PROMPTS["batch 1"]))
    method, one = Scripted({1: keeping(placed, 0.3)}), torch.ones(1, 1, dtype=torch.long)
    with cutting("llava", method, (1,), PROMPTS["batch 1"]) as run, torch.no_grad():
        cached = run.model(**run.inputs).past_key_values
        length = run.inputs["input_ids"].shape[1]
        with pytest.raises(InputError, match="attention mask"):
            run.model(input_ids=one, past_key_values=cached, attention_mask=one)
        with pytest.raises(UnsupportedModeError, match="same batch"):
            run.model(input_ids=one.repeat(2, 1), past_key_values=cached)
        cached.crop(-3)
        mask = torch.ones(1, length - 2, dtype=torch.long)
        run.model(input_ids=one, past_key_values=cached, attention_mask=mask)
        cached.crop(-12)
        with pytest.raises(UnsupportedModeError, match="too many were taken back"):
            run.model(input_ids=one, past_key_values=cached)


def test_a_model_with_the_seam_is_not_copied() -> None:
    with (
        cutting("llava", Scripted({}), (1,), PROMPTS["batch 1"]) as run,
        pytest.raises(PatchError, match="copied or pickled"),
    ):
        copy.deepcopy(run.model.model.language_model)


def test_hooks_that_were_there_see_whole_results() -> None:
    placed = placed_in("llava", model_of("llava"), build_inputs("llava", PROMPTS["batch 1"]))
    seen = []
    hook = model_of("llava").model.language_model.register_forward_hook(
        lambda module, args, output: seen.append(output.last_hidden_state.shape[1])
    )
    try:
        method = Scripted({1: keeping(placed, 0.3)})
        with cutting("llava", method, (1,), PROMPTS["batch 1"]) as run, torch.no_grad():
            run.model(**run.inputs)
    finally:
        hook.remove()
    assert seen == [placed.visual.shape[1]]
