"""Weights of another kind: half precision, adapters of PEFT, 4 bits; checkpoints in training."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import vtc
from tests.kit.models import PLACEHOLDERS, build_model
from tests.kit.oracle import kept_columns, masked, masked_from_layer
from tests.kit.prompts import Inputs, build_inputs
from vtc.errors import PatchError, UnsupportedModeError
from vtc.methods.flowcut import FlowCut
from vtc.methods.todre import ToDre
from vtc.types import Selection

FAMILIES = ("llava", "qwen2_5_vl", "qwen3_vl", "internvl")
METHODS: dict[str, tuple[float, dict[str, Any]]] = {
    "vtc_cls": (0.4, {}),
    "todre": (0.4, {"tau": 1.1}),  # all is dropped under any tau above 1
    "flowcut": (0.4, {"llm_cut": "on"}),
    "downsample": (4, {}),
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


@torch.no_grad()
def masked_logits(
    model: Any, family: str, inputs: Inputs, selections: list[Selection]
) -> tuple[Tensor, Tensor]:
    """Of the stock model that does not attend to what was dropped; and where they count."""
    given, left = masked(model, family, inputs, selections[0]), inputs["attention_mask"].bool()
    left = left & kept_columns(model, family, inputs, selections[0])
    if len(selections) == 1:
        return model(**given).logits, left
    last = kept_columns(model, family, inputs, selections[1])
    layer = len(model.model.language_model.layers) - 1
    with masked_from_layer(model, layer, last):
        return model(**given).logits, left & last


# half precision


def cast(inputs: Inputs, dtype: torch.dtype) -> Inputs:
    return {k: v.to(dtype) if v.is_floating_point() else v for k, v in inputs.items()}


def in_float32(data: Any) -> Any:
    """The same numbers in float32."""
    if isinstance(data, Tensor):
        return data.float() if data.is_floating_point() else data
    if isinstance(data, dict):
        return {name: in_float32(value) for name, value in data.items()}
    return data


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("family", ["llava", "qwen2_5_vl", "internvl"])
@pytest.mark.parametrize("method", ["vtc_cls", "todre"])
def test_half_precision_errs_no_more_than_the_stock_model(
    method: str, family: str, dtype: torch.dtype
) -> None:
    low = build_model(family).to(dtype)
    exact, inputs = copy.deepcopy(low).float(), cast(build_inputs(family, ROWS), dtype)
    with patched(low, method) as handle:
        _, got = answers(low, inputs)
        selections = handle.token_selections
    want, left = masked_logits(exact, family, cast(inputs, torch.float32), selections)
    plain, _ = masked_logits(low, family, inputs, selections)
    assert got.dtype == dtype and bool(left.any())
    error, of_stock = ((x.float() - want)[left].abs().max() for x in (got, plain))
    assert error <= 2 * of_stock


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("family", ["llava", "qwen2_5_vl", "internvl"])
def test_half_precision_chooses_otherwise_only_in_near_ties(
    family: str, dtype: torch.dtype
) -> None:
    low = build_model(family).to(dtype)
    exact = copy.deepcopy(low).float()
    for seed in range(8):
        inputs = cast(build_inputs(family, ROWS, seed), dtype)
        found = []
        for model, given in ((low, inputs), (exact, cast(inputs, torch.float32))):
            with patched(model, "vtc_cls") as handle, torch.no_grad():
                model(**given)
            found.append(handle.token_selections[0])
        scores = found[1].scores
        assert scores is not None
        tie = 2 * torch.finfo(dtype).eps * scores.amax(-1)
        for g, other in enumerate(found[0].mask() != found[1].mask()):
            if other.any():
                assert scores[g, other].max() - scores[g, other].min() < tie[g]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("family", ["llava", "qwen2_5_vl", "internvl"])
@pytest.mark.parametrize("method", ["todre", "flowcut"])
def test_what_half_precision_computed_is_decided_on_in_float32(
    method: str, family: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each decision is the one that the same numbers in float32 would lead to."""
    seen = []

    def checking(kind: type, name: str) -> None:
        stock: Callable[..., Any] = getattr(kind, name)

        def decide(self: Any, view: Any, budget: Any) -> Any:
            fields = {f.name: getattr(view, f.name) for f in dataclasses.fields(view) if f.init}
            raised = dataclasses.replace(view, **{k: in_float32(v) for k, v in fields.items()})
            got, want = stock(self, view, budget), stock(self, raised, budget)
            for a, b in ((got, want), (getattr(got, "keep", None), getattr(want, "keep", None))):
                assert not isinstance(a, Tensor) or torch.equal(a, b)
            seen.append(name)
            return got

        monkeypatch.setattr(kind, name, decide)

    checking(ToDre, "select")
    checking(ToDre, "layer_cut")
    checking(FlowCut, "encoder_cut")
    checking(FlowCut, "layer_cut")
    model = build_model(family).to(dtype)
    with patched(model, method) as handle:
        answers(model, cast(build_inputs(family, ROWS), dtype))
    assert set(seen) == {"select" if method == "todre" else "encoder_cut", "layer_cut"}
    assert handle.report().kept_fraction < 0.5


def test_a_model_may_change_its_precision_while_it_is_patched() -> None:
    inputs = build_inputs("llava", ROWS)
    for method in METHODS:
        model = build_model("llava")
        with patched(model, method):
            answers(model, inputs)
            model.bfloat16()
            got = answers(model, cast(inputs, torch.bfloat16))
        with patched(model, method):
            assert same(answers(model, cast(inputs, torch.bfloat16)), got)


# adapters of PEFT


def lora(model: Any, task: str | None = None) -> Any:
    """Random adapters in the LLM and in the tower."""
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(0)
    targets = ["q_proj", "v_proj", "qkv"]
    config = LoraConfig(target_modules=targets, init_lora_weights=False, r=4, task_type=task)
    return get_peft_model(model, config)


@pytest.mark.parametrize("task", [None, "CAUSAL_LM"])
@pytest.mark.parametrize("family", ["llava", "qwen2_5_vl"])
@pytest.mark.parametrize("method", METHODS)
def test_a_model_that_peft_wrapped(family: str, method: str, task: str | None) -> None:
    inputs = build_inputs(family, ROWS)
    bare, wrapped = build_model(family), lora(build_model(family), task)
    inner = wrapped.get_base_model()
    adapted = {name.split(".")[0:2][-1] for name, p in inner.named_parameters() if p.requires_grad}
    assert len(adapted) == 2, "adapters in one half of the model alone"
    stock = answers(wrapped, inputs)
    with patched(inner, method):
        want = answers(inner, inputs)
    assert not same(want, stock)
    with patched(bare, method):
        assert not same(answers(bare, inputs), want)
    handle = patched(wrapped, method)
    assert same(answers(wrapped, inputs), want)
    assert handle.report().kept_fraction < 1
    for given in (wrapped, inner):
        with pytest.raises(PatchError, match="patched already"):
            patched(given, method)
    vtc.unpatch(wrapped)
    assert same(answers(wrapped, inputs), stock)
    # wrapped only now
    patched(bare, method)
    later = lora(bare, task)
    assert same(answers(later, inputs), want)
    with later.disable_adapter(), patched(fresh := build_model(family), method):
        assert same(answers(later, inputs), answers(fresh, inputs))
    vtc.unpatch(later)
    assert same(answers(later, inputs), stock)
    with pytest.raises(PatchError, match="is not patched"):
        vtc.unpatch(later)


def test_training_adapters_equals_the_oracle() -> None:
    inputs = labeled(build_inputs("llava", ROWS))
    wrapped = lora(build_model("llava"), "CAUSAL_LM")
    with patched(wrapped, "vtc_cls") as handle:
        got = gradients_of(wrapped, inputs)
    assert len(got) > 20 and all("lora" in name for name in got.keys() - {"loss"})
    given = masked(wrapped.get_base_model(), "llava", inputs, handle.token_selections[0])
    assert_close(got, gradients_of(wrapped, given))


@pytest.mark.parametrize("kind", ["PromptTuningConfig", "PrefixTuningConfig"])
def test_virtual_tokens_of_peft_are_refused(kind: str) -> None:
    import peft

    sizes = {"num_layers": 4, "token_dim": 64, "num_attention_heads": 4}
    config = getattr(peft, kind)(
        task_type="CAUSAL_LM", num_virtual_tokens=3, num_transformer_submodules=1, **sizes
    )
    model = build_model("llava")
    wrapped = peft.get_peft_model(model, config)
    with pytest.raises(UnsupportedModeError, match="expected one that changes weights"):
        patched(wrapped, "vtc_cls")
    patched(model, "vtc_cls")
    vtc.unpatch(wrapped)


# 4 bits


class Sealed(nn.Module):
    """A linear layer whose weights are packed, and of no use to anybody else."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.in_features, self.out_features, self.bias = (
            linear.in_features,
            linear.out_features,
            linear.bias,
        )
        self.scale = linear.weight.detach().abs().amax(-1, keepdim=True) / 7
        levels = (linear.weight.detach() / self.scale).round().to(torch.int16) + 8
        self.packed = (levels[:, ::2] * 16 + levels[:, 1::2]).to(torch.uint8)

    @property
    def weight(self) -> Tensor:
        raise AssertionError("weights were read")

    def unpacked(self) -> Tensor:
        pairs = torch.stack([self.packed // 16, self.packed % 16], -1).flatten(-2)
        return (pairs.float() - 8) * self.scale

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x, self.unpacked(), self.bias)


def replaced(model: Any, kind: type[nn.Module], new: Callable[[Any], nn.Module]) -> Any:
    """Every module of this kind but the head by what `new` makes of it."""
    for name, module in list(model.named_modules()):
        for child, old in list(module.named_children()):
            if isinstance(old, kind) and child != "lm_head":
                setattr(model.get_submodule(name), child, new(old))
    return model


def plain(weight: Tensor, bias: Tensor | None) -> nn.Linear:
    linear = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None)
    linear.weight = nn.Parameter(weight.detach().clone())
    linear.bias = bias
    return linear


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("method", METHODS)
def test_nothing_reads_the_weights_of_packed_layers(family: str, method: str) -> None:
    inputs = build_inputs(family, ROWS)
    packed = replaced(build_model(family), nn.Linear, Sealed)
    assert sum(isinstance(m, Sealed) for m in packed.modules()) > 40
    unpacked = replaced(copy.deepcopy(packed), Sealed, lambda m: plain(m.unpacked(), m.bias))
    with patched(packed, method) as one, patched(unpacked, method) as other:
        assert same(answers(packed, inputs), answers(unpacked, inputs))
        assert one.report().kept_tokens == other.report().kept_tokens


def test_4_bits_of_bitsandbytes(tmp_path: Path) -> None:
    bnb = pytest.importorskip("bitsandbytes")
    from transformers import BitsAndBytesConfig, LlavaForConditionalGeneration

    build_model("llava").save_pretrained(tmp_path)
    model = LlavaForConditionalGeneration.from_pretrained(
        tmp_path,
        quantization_config=BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_compute_dtype=torch.float32, bnb_4bit_quant_type="nf4"
        ),
        dtype=torch.float32,
        device_map="cpu",
    )
    of = [name for name, m in model.named_modules() if isinstance(m, bnb.nn.Linear4bit)]
    assert any("vision_tower" in name for name in of) and any("language" in name for name in of)
    dequantized = build_model("llava")
    for name in of:
        old = model.get_submodule(name)
        weight = bnb.functional.dequantize_4bit(old.weight.data, old.weight.quant_state)
        parent, _, child = name.rpartition(".")
        setattr(dequantized.get_submodule(parent), child, plain(weight, old.bias))
    inputs = build_inputs("llava", ROWS)
    before = {name: weight.clone() for name, weight in model.state_dict().items()}
    for method in METHODS:
        with patched(model, method) as handle, patched(dequantized, method):
            generated, got = answers(model, inputs)
            tokens, want = answers(dequantized, inputs)
        assert torch.equal(generated, tokens)
        assert torch.allclose(got, want, rtol=0, atol=1e-5)
        if method in ("vtc_cls", "todre"):
            want, left = masked_logits(model, "llava", inputs, handle.token_selections)
            assert torch.allclose(got[left], want[left], rtol=0, atol=1e-5)
    after = model.state_dict()
    assert all(torch.equal(after[name], weight) for name, weight in before.items())


# gradient checkpointing


def gradients_of(model: Any, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    model.zero_grad()
    loss = model(**inputs).loss
    loss.backward()
    found = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    return {"loss": loss.detach(), **found}


def assert_close(got: dict[str, Tensor], want: dict[str, Tensor]) -> None:
    assert got.keys() == want.keys()
    scale = max(value.abs().max() for value in want.values())
    for name, value in want.items():
        assert torch.allclose(got[name], value, rtol=1e-4, atol=float(scale) * 1e-5), name


def labeled(inputs: Inputs) -> Inputs:
    """With the labels that are predicted from the same token as in the stock model: what is behind
    an image, or first in its row, is not."""
    ids, mask = inputs["input_ids"], inputs["attention_mask"] == 0
    ignored = (ids >= 90) | (ids.roll(1, -1) >= 90) | mask | mask.roll(1, -1)
    return {**inputs, "labels": ids.masked_fill(ignored, -100)}


def training(family: str) -> tuple[Any, Inputs]:
    return build_model(family).train(), labeled(build_inputs(family, ROWS))


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("method", ["vtc_cls", "downsample"])
def test_gradients_with_checkpoints(family: str, method: str, reentrant: bool) -> None:
    model, inputs = training(family)
    with patched(model, method) as handle:
        want = gradients_of(model, inputs)
    checkpoint(model, reentrant)
    with patched(model, method):
        got = gradients_of(model, inputs)
    assert_close(got, want)
    if method == "vtc_cls":
        given = masked(model, family, inputs, handle.token_selections[0])
        oracle = gradients_of(model, given)
        assert len(oracle) > 50
        assert_close(got, oracle)


def checkpoint(model: Any, reentrant: bool) -> None:
    """Under the name that this version of transformers prefers."""
    name = "activation_checkpointing_enable"
    enable = getattr(model, name, model.gradient_checkpointing_enable)
    enable({"use_reentrant": reentrant})
    assert model.is_gradient_checkpointing


# stock says so of its own forward
@pytest.mark.filterwarnings("ignore:.*use_cache=True.*incompatible:UserWarning")
@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(
    "method, keep, options, what",
    [
        ("flowcut", 0.4, {"llm_cut": "off"}, "cuts inside the encoder while it trains"),
        ("flowcut", 0.4, {"llm_cut": "on"}, "cuts inside the encoder while it trains"),
        ("todre", 0.4, {"tau": 1.1}, "between decoder layers"),
        ("todre", None, {"tau": 1.1, "stage1": False}, "between decoder layers"),
    ],
)
def test_cuts_that_a_checkpoint_would_repeat_are_refused(
    family: str,
    method: str,
    keep: float | None,
    options: dict[str, Any],
    what: str,
    reentrant: bool,
) -> None:
    model, inputs = training(family)
    with vtc.patch(model, method, keep, **options):
        want = gradients_of(model, inputs)
        checkpoint(model, reentrant)
        with pytest.raises(UnsupportedModeError, match=what):
            model(**inputs)
        # not in training, there are no checkpoints
        model.eval()
        assert torch.equal(model(**inputs).loss, want["loss"])
        model.train()
        model.gradient_checkpointing_disable()
        assert_close(gradients_of(model, inputs), want)
