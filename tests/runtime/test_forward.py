"""Direct forward calls, own decoding loops and losses on a patched model equal the oracle."""

from __future__ import annotations

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


@pytest.mark.parametrize("pass_positions", [True, False])
@pytest.mark.parametrize("positions", ["keep", "renumber"])
@torch.no_grad()
def test_own_decoding_loop_equals_generate(
    llava: Any, make_inputs: Any, positions: str, pass_positions: bool
) -> None:
    inputs = make_inputs([[4, None, 5]])
    with vtc.patch(llava, "vtc_cls", 0.25, positions=positions):
        want = llava.generate(**inputs, max_new_tokens=6, do_sample=False, suppress_tokens=[90])
        ids, mask, cache, step = inputs["input_ids"], inputs["attention_mask"], None, dict(inputs)
        length = ids.shape[1]
        for t in range(6):
            if pass_positions:
                step["position_ids"] = (
                    torch.arange(length)[None] if t == 0 else torch.tensor([[length + t - 1]])
                )
            out = llava(**step, past_key_values=cache, use_cache=True)
            logits = out.logits[:, -1].index_fill(1, torch.tensor([90]), -torch.inf)
            token, cache = logits.argmax(-1, keepdim=True), out.past_key_values
            ids, mask = torch.cat([ids, token], 1), torch.cat([mask, torch.ones_like(token)], 1)
            step = {"input_ids": token, "attention_mask": mask}
    assert torch.equal(ids, want)
    assert cache.get_seq_length() == length - 36 + 9 + 5


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


@torch.no_grad()
def test_keeping_everything_is_bit_identical(llava: Any, make_inputs: Any) -> None:
    inputs = make_inputs(PROMPTS["mixed"])
    want = llava(**inputs).logits
    for method, keep in [("vtc_cls", 1.0), ("downsample", 1.0), ("random", 100)]:
        with vtc.patch(llava, method, keep):
            assert torch.equal(llava(**inputs).logits, want)


@torch.no_grad()
@pytest.mark.parametrize("method", ["average_pool", "downsample"])
def test_forward_and_generate_agree_on_restated_tokens(
    llava: Any, make_inputs: Any, method: str
) -> None:
    inputs = make_inputs([[4, None, 5], [2, None, None, 3]])
    inputs["position_ids"] = (inputs["attention_mask"].cumsum(-1) - 1).clamp_min(0)
    with vtc.patch(llava, method, 10):
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
