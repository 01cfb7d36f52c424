"""What was encoded before is not encoded again, and nothing that follows can tell."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor

import vtc
from tests.kit.matrix import (
    BOTH,
    FAMILIES,
    MIXED,
    REFUSED,
    SPECS,
    accepted,
    cached_inputs,
    model_of,
    run,
)
from vtc.adapters.registry import adapter_of
from vtc.runtime.encodings import Encodings

PLENTY = 2**30
# encoded anew: what is cut inside the encoder or resized before it
ANEW = ("encoder", "pixels")


@contextmanager
def counted(model: Any) -> Iterator[list[int]]:
    """How often the vision tower runs."""
    runs: list[int] = []
    tower = adapter_of(model).tower
    hook = tower.register_forward_hook(lambda *_: runs.append(1))
    try:
        yield runs
    finally:
        hook.remove()


def generated(model: Any, method: Any, keep: Any, inputs: Any, held: Encodings | None) -> Any:
    """Tokens and their logits, what was left, and the report's counts."""
    with vtc.patch(model, method, keep) as handle:
        if held is not None:
            handle.recall(held)
        out = run(model, inputs, max_new_tokens=2, output_logits=True, return_dict_in_generate=True)
        left = [selection.mask().tolist() for selection in handle.remaining]
        return (
            (out.sequences, *out.logits),
            left,
            handle.report().kept_tokens,
            handle.report().kv_lengths,
        )


def same(some: tuple[Tensor, ...], others: tuple[Tensor, ...]) -> bool:
    return all(map(torch.equal, some, others))


@pytest.mark.parametrize(
    "family",
    [pytest.param(f, marks=[pytest.mark.slow] if f != "llava_next" else []) for f in FAMILIES],
)
def test_methods_that_share_encodings_answer_as_without(family: str) -> None:
    prompt = BOTH if BOTH in accepted(family, SPECS[0]) else MIXED
    inputs = cached_inputs(family, prompt)
    held: dict[Any, Encodings] = {}
    # one of those that ask the same of the encoder
    alike = {(spec.method(family).site, spec.method(family).needs): spec for spec in SPECS}
    for spec in alike.values():
        if (family, spec.name, prompt) in REFUSED:
            continue
        model, method = spec.model(family), spec.method(family)
        shared = held.setdefault(id(model), Encodings(PLENTY))
        with counted(model) as needed:
            want = generated(model, method, spec.keep, inputs, None)
        for again in (False, True):
            with counted(model) as runs:
                got = generated(model, method, spec.keep, inputs, shared)
            assert same(got[0], want[0]), spec
            assert got[1:] == want[1:], spec
            if again and spec.name != "none" and method.site not in ANEW:
                # where nothing is dropped, the stock model runs behind that
                assert len(runs) < len(needed), spec


def test_a_signal_not_read_before_runs_the_encoder_once_more() -> None:
    model, inputs = model_of("llava"), cached_inputs("llava", MIXED)
    held = Encodings(PLENTY)
    with counted(model) as runs:
        for method in ("uniform", "vtc_cls", "vtc_cls", "uniform"):
            generated(model, method, 0.4, inputs, held)
    assert len(runs) == 2


@pytest.mark.parametrize("name", ["pixel_values", "input_ids", "attention_mask"])
def test_other_inputs_are_encoded(name: str) -> None:
    model, inputs = model_of("llava"), dict(cached_inputs("llava", "batch 1"))
    held = Encodings(PLENTY)
    generated(model, "uniform", 0.4, inputs, held)
    changed: Tensor = inputs[name].clone()
    # one bit of a text token, of the mask behind none, of a pixel
    changed[0, 0] = changed[0, 0] + 1 if name != "attention_mask" else 0
    inputs[name] = changed
    with counted(model) as runs:
        got = generated(model, "uniform", 0.4, inputs, held)
    assert runs
    assert same(got[0], generated(model, "uniform", 0.4, inputs, None)[0])


def test_no_more_is_held_than_the_limit() -> None:
    model, inputs = model_of("llava"), cached_inputs("llava", "batch 1")
    other = cached_inputs("llava", "image first")
    size = Encodings(PLENTY)
    generated(model, "uniform", 0.4, inputs, size)
    held = Encodings(size.bytes)
    for given in (inputs, other, inputs, other):
        generated(model, "uniform", 0.4, given, held)
    assert 0 < held.bytes == size.bytes
    with counted(model) as runs:
        generated(model, "uniform", 0.4, inputs, held)
        assert not runs
        generated(model, "uniform", 0.4, other, held)
        assert runs


def test_the_handle_without_encodings_encodes() -> None:
    model, inputs = model_of("llava"), cached_inputs("llava", "batch 1")
    held = Encodings(PLENTY)
    generated(model, "uniform", 0.4, inputs, held)
    with counted(model) as runs:
        generated(model, "uniform", 0.4, inputs, None)
    assert runs
