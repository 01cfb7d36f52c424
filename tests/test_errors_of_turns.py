"""What is refused behind a cache that is not empty, and what it says."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import vtc
from vtc import errors


def test_images_behind_a_cache_are_refused_in_forward(llava: Any, make_inputs: Any) -> None:
    """Of a system prompt, say: what it holds cannot be told from what was dropped."""
    inputs = make_inputs([[4, None, 5]])
    cache = llava(input_ids=inputs["input_ids"][:, :3], use_cache=True).past_key_values
    with (
        vtc.patch(llava, "vtc_cls", 0.5),
        pytest.raises(errors.UnsupportedModeError, match=r"expected none in a forward"),
    ):
        llava(**inputs | {"input_ids": inputs["input_ids"][:, 3:]}, past_key_values=cache)


def test_images_behind_images_that_are_not_ours(llava: Any, make_inputs: Any) -> None:
    inputs = make_inputs([[4, None, 5, None, 3]])
    first = inputs["input_ids"][:, :45], inputs["pixel_values"][:1]
    cache = llava(input_ids=first[0], pixel_values=first[1], use_cache=True).past_key_values
    with (
        vtc.patch(llava, "vtc_cls", 0.5),
        pytest.raises(errors.UnsupportedModeError, match="was not filled by this patched model"),
    ):
        llava.generate(**inputs, past_key_values=cache, max_new_tokens=2)


def test_position_ids_of_a_later_turn_are_refused(llava: Any, make_inputs: Any) -> None:
    inputs = make_inputs([[4, None, 5]])
    with vtc.patch(llava, "vtc_cls", 0.5):
        first = llava.generate(**inputs, max_new_tokens=2, return_dict_in_generate=True)
        ids = torch.cat([first.sequences, torch.tensor([[7, 8]])], 1)
        with pytest.raises(errors.UnsupportedModeError, match="goes on where the cache ended"):
            llava.generate(
                input_ids=ids,
                position_ids=torch.arange(ids.shape[1])[None],
                past_key_values=first.past_key_values,
                max_new_tokens=2,
            )


@pytest.mark.parametrize("change", ["rows", "shorter"])
def test_a_conversation_that_does_not_continue_its_cache(
    llava: Any, make_inputs: Any, change: str
) -> None:
    inputs = make_inputs([[4, None, 5]])
    options = {"max_new_tokens": 2, "return_dict_in_generate": True}
    with vtc.patch(llava, "vtc_cls", 0.5):
        first = llava.generate(**inputs, **options)
        ids = first.sequences[:, :-2] if change == "shorter" else first.sequences.repeat(2, 1)
        match = "stands for 46, expected more" if change == "shorter" else "2 rows and a cache of 1"
        with pytest.raises(errors.InputError, match=match):
            llava.generate(
                input_ids=ids,
                attention_mask=torch.ones_like(ids),
                past_key_values=first.past_key_values,
                max_new_tokens=2,
            )


def test_assisted_decoding_behind_a_compressed_prompt_is_refused(
    llava: Any, make_inputs: Any
) -> None:
    inputs = make_inputs([[4, None, 5]])
    with vtc.patch(llava, "vtc_cls", 0.5):
        out = llava.generate(**inputs, max_new_tokens=2, return_dict_in_generate=True)
        ids = torch.cat([out.sequences, torch.tensor([[7, 8]])], 1)
        with pytest.raises(errors.UnsupportedModeError, match="expected plain decoding"):
            llava.generate(
                input_ids=ids,
                past_key_values=out.past_key_values,
                max_new_tokens=2,
                prompt_lookup_num_tokens=2,
            )


def test_a_cache_that_was_cut_between_layers_needs_a_method_that_cuts_there(
    llava: Any, make_inputs: Any
) -> None:
    inputs = make_inputs([[4, None, 5]])
    with vtc.patch(llava, "flowcut", 0.2, llm_cut="on"):
        out = llava.generate(**inputs, max_new_tokens=2, return_dict_in_generate=True)
    ids = torch.cat([out.sequences, torch.tensor([[7, 8]])], 1)
    with (
        vtc.patch(llava, "vtc_cls", 0.5),
        pytest.raises(errors.UnsupportedModeError, match="layers hold different numbers"),
    ):
        llava.generate(input_ids=ids, past_key_values=out.past_key_values, max_new_tokens=2)
