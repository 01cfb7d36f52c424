"""Direct forward calls, own decoding loops and losses on a patched model equal the oracle."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
import torch

import vtc
from vtc.errors import NeverCompressedError, UnsupportedModeError

PROMPTS: dict[str, list[list[int | None]]] = {
    "batch 1": [[4, None, 6]],
    "ragged": [[4, None, 5], [2, None, 9]],
    "mixed": [[4, None, 2, None, 5], [2, None, 9], [7]],
}


def answer_labels(inputs: dict[str, torch.Tensor], tokens: int = 4) -> torch.Tensor:
    labels = torch.full_like(inputs["input_ids"], -100)
    labels[:, -tokens:] = inputs["input_ids"][:, -tokens:]
    return labels


@pytest.mark.parametrize("use_cache", [True, False])
@pytest.mark.parametrize("prompt", PROMPTS)
@torch.no_grad()
def test_loss_and_text_logits_equal_the_oracle(
    llava: Any, make_inputs: Any, oracle: Any, prompt: str, use_cache: bool
) -> None:
    inputs = make_inputs(PROMPTS[prompt])
    # the oracle's position ids count attended tokens; a bare forward would count columns
    positions = (inputs["attention_mask"].cumsum(-1) - 1).clamp_min(0)
    inputs["position_ids"] = positions
    labels = answer_labels(inputs)
    for method, keep in [("vtc_cls", 0.3), ("random", 5), ("uniform", 1)]:
        with vtc.patch(llava, method, keep) as handle:
            got = llava(**inputs, labels=labels, use_cache=use_cache)
        want = llava(**oracle(inputs, handle.selections[0]), labels=labels, use_cache=use_cache)
        assert got.logits.shape == want.logits.shape
        assert abs(got.loss - want.loss) < 1e-5
        text = labels != -100
        torch.testing.assert_close(got.logits[text], want.logits[text], atol=1e-5, rtol=0)


@torch.no_grad()
def test_without_a_mask_gaps_in_positions_are_not_read_as_packed_sequences(
    llava: Any, make_inputs: Any, oracle: Any
) -> None:
    inputs = make_inputs([[4, None, 6]])
    bare = {k: v for k, v in inputs.items() if k != "attention_mask"}
    with vtc.patch(llava, "vtc_cls", 0.3) as handle:
        got = llava(**bare, use_cache=False).logits[:, -1]
    want = llava(**oracle(inputs, handle.selections[0]), use_cache=False).logits[:, -1]
    torch.testing.assert_close(got, want, atol=1e-5, rtol=0)


@torch.no_grad()
def test_first_text_token_is_predicted_from_the_last_kept_one(llava: Any, make_inputs: Any) -> None:
    inputs = make_inputs([[4, None, 6]])
    with vtc.patch(llava, "uniform", 4) as handle:
        hidden = llava.model(**inputs).last_hidden_state
    image = (inputs["input_ids"][0] == 90).nonzero()[:, 0]
    last_kept = image[handle.selections[0].mask()[0]][-1]
    for column in range(last_kept, image[-1] + 1):
        assert torch.equal(hidden[0, column], hidden[0, last_kept])


@torch.no_grad()
def test_loss_on_all_text_is_that_of_the_short_sequence(llava: Any, make_inputs: Any) -> None:
    """Also on the first token behind the image, where the oracle would answer from a dropped
    token."""
    inputs = make_inputs([[4, None, 6]])
    (ids,) = inputs["input_ids"]
    labels = ids.masked_fill(ids == 90, -100)
    with vtc.patch(llava, "vtc_cls", 9) as handle:
        got = llava(**inputs, labels=labels[None]).loss
    stays = ids != 90
    stays[ids == 90] = handle.selections[0].mask()[0]
    embeds = llava.get_input_embeddings()(ids)
    embeds[ids == 90] = llava.get_image_features(inputs["pixel_values"]).pooler_output[0]
    want = llava(
        inputs_embeds=embeds[stays][None],
        attention_mask=torch.ones(1, int(stays.sum()), dtype=torch.long),
        position_ids=stays.nonzero().T,
        labels=labels[stays][None],
    ).loss
    assert abs(got - want) < 1e-5


@torch.no_grad()
def test_rows_padded_on_the_right(llava: Any, make_inputs: Any, oracle: Any) -> None:
    inputs = make_inputs([[4, None, 5], [2, None, 9]])
    shift = inputs["attention_mask"].argmax(-1)
    for name in ("input_ids", "attention_mask"):
        rows = zip(inputs[name], shift.tolist(), strict=True)
        inputs[name] = torch.stack([row.roll(-n) for row, n in rows])
    labels = inputs["input_ids"].masked_fill(inputs["attention_mask"] == 0, -100)
    last = (labels == 90).int() * torch.arange(labels.shape[1])
    labels[labels == 90] = -100
    labels.scatter_(1, last.argmax(-1, keepdim=True) + 1, -100)
    for method, keep in [("vtc_cls", 0.3), ("random", 1)]:
        with vtc.patch(llava, method, keep) as handle:
            got = llava(**inputs, labels=labels)
        want = llava(**oracle(inputs, handle.selections[0]), labels=labels)
        assert abs(got.loss - want.loss) < 1e-5
        text = labels != -100
        torch.testing.assert_close(got.logits[text], want.logits[text], atol=1e-5, rtol=0)


@torch.no_grad()
def test_every_form_of_the_result(llava: Any, make_inputs: Any, oracle: Any) -> None:
    inputs = make_inputs(PROMPTS["mixed"])
    with vtc.patch(llava, "vtc_cls", 0.3) as handle:
        full = llava(**inputs, output_hidden_states=True)
        assert torch.equal(llava(**inputs, return_dict=False)[0], full.logits)
        assert torch.equal(llava.model(**inputs, return_dict=False)[0], full.hidden_states[-1])
        for few, where in [(1, [-1]), (3, [-3, -2, -1]), (torch.tensor([0, 2, -1]), [0, 2, -1])]:
            got = llava(**inputs, logits_to_keep=few).logits
            torch.testing.assert_close(got, full.logits[:, where], atol=1e-6, rtol=0)
    inputs["position_ids"] = torch.arange(inputs["input_ids"].shape[1])[None]
    want = llava(
        **oracle(inputs, handle.selections[0]) | {"position_ids": inputs["position_ids"]},
        output_hidden_states=True,
    )
    text = (inputs["input_ids"] != 90) & (inputs["attention_mask"] == 1)
    for got_layer, want_layer in zip(full.hidden_states, want.hidden_states, strict=True):
        assert got_layer.shape == want_layer.shape
        torch.testing.assert_close(got_layer[text], want_layer[text], atol=1e-5, rtol=0)


@pytest.mark.parametrize("cache", ["dynamic", "static"])
@pytest.mark.parametrize("pass_positions", [True, False])
@pytest.mark.parametrize("positions", ["keep", "renumber"])
@torch.no_grad()
def test_own_decoding_loop_equals_generate(
    llava: Any, make_inputs: Any, positions: str, pass_positions: bool, cache: str
) -> None:
    from transformers import StaticCache

    # without position ids, stock counts columns: a batch is then right only if all rows are as long
    inputs = make_inputs([[4, None, 5], [2, None, 9 if pass_positions else 7]])
    kept = StaticCache(llava.config.text_config, max_cache_len=99) if cache == "static" else None
    with vtc.patch(llava, "vtc_cls", 0.25, positions=positions):
        want = llava.generate(**inputs, max_new_tokens=6, do_sample=False, suppress_tokens=[90])
        ids, mask, step = inputs["input_ids"], inputs["attention_mask"], dict(inputs)
        length = ids.shape[1]
        for t in range(6):
            if pass_positions:
                where = (mask.cumsum(-1) - 1).clamp_min(0)
                step["position_ids"] = where if t == 0 else where[:, -1:]
            out = llava(**step, past_key_values=kept, use_cache=True)
            logits = out.logits[:, -1].index_fill(1, torch.tensor([90]), -torch.inf)
            token, kept = logits.argmax(-1, keepdim=True), out.past_key_values
            ids, mask = torch.cat([ids, token], 1), torch.cat([mask, torch.ones_like(token)], 1)
            step = {"input_ids": token, "attention_mask": mask}
    assert torch.equal(ids, want)
    assert int(kept.get_seq_length()) == length - 36 + 9 + 5


@torch.no_grad()
def test_embeddings_in_place_of_ids(llava: Any, make_inputs: Any) -> None:
    inputs = make_inputs(PROMPTS["mixed"])
    ids = inputs["input_ids"]
    embedded = {k: v for k, v in inputs.items() if k != "input_ids"}
    embedded["inputs_embeds"] = llava.get_input_embeddings()(ids)
    for method in ("vtc_cls", "average_pool", "downsample"):
        with vtc.patch(llava, method, 10) as handle:
            want = llava(**inputs).logits
            assert torch.equal(llava(**embedded).logits, want)
            assert max(handle.report().llm_tokens) <= 10


@dataclass(frozen=True, kw_only=True)
class KeepsAll(vtc.Method):
    """Decides by itself, and for everything."""

    count = "adaptive"

    def select(self, tokens: vtc.Tokens, budget: vtc.Budget) -> vtc.Selection:
        return vtc.Selection.everything(tokens.lengths, tokens.parent, tokens.grid)


@dataclass(frozen=True, kw_only=True)
class KeepsAllPixels(KeepsAll):
    site = "pixels"


@pytest.mark.parametrize("method", [KeepsAll(), KeepsAllPixels()])
@torch.no_grad()
def test_a_method_that_decides_to_keep_everything_is_bit_identical(
    llava: Any, make_inputs: Any, method: vtc.Method
) -> None:
    inputs = make_inputs(PROMPTS["mixed"])
    options = {"max_new_tokens": 4, "do_sample": False, "suppress_tokens": [90]}
    want = llava(**inputs).logits, llava.generate(**inputs, **options)
    with vtc.patch(llava, method) as handle:
        assert torch.equal(llava(**inputs).logits, want[0])
        assert handle.report().kept_fraction == 1
        assert torch.equal(llava.generate(**inputs, **options), want[1])
        assert handle.report().method == type(method).__name__


@torch.no_grad()
def test_an_interrupt_does_not_disturb_the_next_call(llava: Any, make_inputs: Any) -> None:
    """torch runs no hook behind a KeyboardInterrupt."""
    inputs = make_inputs(PROMPTS["batch 1"])

    def interrupt(*_: Any) -> None:
        raise KeyboardInterrupt

    modules = dict(llava.named_modules())
    tower = next(name for name in modules if name.endswith("encoder.layers.5"))
    with vtc.patch(llava, "vtc_cls", 0.3):
        want = llava(**inputs).logits
        for name in (tower, "model.language_model.layers.1"):
            hook = modules[name].register_forward_pre_hook(interrupt)
            with pytest.raises(KeyboardInterrupt):
                llava(**inputs)
            hook.remove()
            assert torch.equal(llava(**inputs).logits, want)


def test_gradients_reach_the_text_embeddings_as_in_the_oracle(
    llava: Any, make_inputs: Any, oracle: Any
) -> None:
    inputs = make_inputs([[4, None, 6]])
    labels = answer_labels(inputs)
    weight = llava.get_input_embeddings().weight

    def gradient(given: dict[str, torch.Tensor]) -> torch.Tensor:
        (grad,) = torch.autograd.grad(llava(**given, labels=labels).loss, weight)
        return grad

    with vtc.patch(llava, "vtc_cls", 0.3) as handle:
        got = gradient(inputs)
    torch.testing.assert_close(
        got, gradient(oracle(inputs, handle.selections[0])), atol=1e-6, rtol=1e-4
    )


@pytest.mark.parametrize("method", ["vtc_cls", "average_pool", "downsample"])
def test_gradients_reach_the_pixels(llava: Any, make_inputs: Any, oracle: Any, method: str) -> None:
    inputs = make_inputs([[4, None, 6]])
    labels, pixels = answer_labels(inputs), inputs["pixel_values"].requires_grad_()
    with vtc.patch(llava, method, 9) as handle:
        (got,) = torch.autograd.grad(llava(**inputs, labels=labels).loss, pixels)
    assert got.abs().sum() > 0
    if method == "vtc_cls":
        masked = oracle(inputs, handle.selections[0])
        (want,) = torch.autograd.grad(llava(**masked, labels=labels).loss, pixels)
        torch.testing.assert_close(got, want, atol=1e-6, rtol=1e-4)


@torch.no_grad()
def test_keeping_everything_is_bit_identical(llava: Any, make_inputs: Any) -> None:
    inputs = make_inputs(PROMPTS["mixed"])
    want = llava(**inputs, output_hidden_states=True)
    calibration = vtc.Calibration(layer_contribution=(1.0,) * 4, sink_dims=())
    for method in vtc.methods():
        if vtc.method(method).count == "adaptive":
            continue
        rows = method in ("naavit", "shortv", "yopo")
        options = {"calibration": calibration} if rows else {}
        if method == "yopo":  # a window and pruned heads act on all layers
            options |= {"window": None, "heads": 1.0}
        for keep in (1.0, 0.999) if method == "vtc_cls" else (1.0,):
            with vtc.patch(llava, method, keep, **options):
                got = llava(**inputs, output_hidden_states=True)
            assert torch.equal(got.logits, want.logits)
            assert all(map(torch.equal, got.hidden_states, want.hidden_states))


@torch.no_grad()
@pytest.mark.parametrize("positions", ["keep", "renumber", "median"])
@pytest.mark.parametrize("method", ["vtc_cls", "average_pool", "downsample"])
def test_forward_and_generate_agree(
    llava: Any, make_inputs: Any, method: str, positions: str
) -> None:
    inputs = make_inputs([[4, None, 5], [2, None, None, 3]])
    inputs["position_ids"] = (inputs["attention_mask"].cumsum(-1) - 1).clamp_min(0)
    with vtc.patch(llava, method, 10, positions=positions):
        logits = llava(**inputs).logits[:, -1]
        out = llava.generate(
            **inputs,
            max_new_tokens=1,
            do_sample=False,
            return_dict_in_generate=True,
            output_logits=True,
        )
    torch.testing.assert_close(logits, out.logits[0], atol=1e-6, rtol=0)


@torch.no_grad()
def test_features_computed_elsewhere_are_refused(llava: Any, make_inputs: Any) -> None:
    inputs = make_inputs([[4, None, 5]])
    features = {"image": llava.get_image_features(inputs.pop("pixel_values"))}
    with vtc.patch(llava, "vtc_cls", 0.3):
        with pytest.raises(UnsupportedModeError, match="mm_encoder_outputs"):
            llava(**inputs, mm_encoder_outputs=features)
        with pytest.raises(UnsupportedModeError, match="mm_encoder_outputs"):
            llava.generate(**inputs, mm_encoder_outputs=features)


def test_a_site_that_is_never_reached_raises(
    llava: Any, make_inputs: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    inputs = make_inputs([[4, None, 5]])
    with vtc.patch(llava, "vtc_cls", 0.3):
        monkeypatch.setattr(llava.model, "forward", lambda **_: "not the language model's output")
        with pytest.raises(NeverCompressedError, match="was not run"):
            llava.model(**inputs)
