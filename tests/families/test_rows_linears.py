"""Projections of visual rows that are skipped are not computed: how many rows each linear sees, and
the floating-point operations that torch counts."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

import vtc
from tests.kit.matrix import MIXED, cached_inputs, model_of, run
from tests.kit.models import FAMILIES
from tests.kit.plain_methods import prompt_of

pytestmark = pytest.mark.filterwarnings("ignore:.*(do_sample|max_length).*")

ATTENTION = ("self_attn.q_proj", "self_attn.o_proj")
KEYS = ("self_attn.k_proj", "self_attn.v_proj")
FFN = ("mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")
# layers 1 and 2: (options, whether visual rows attend there, whether they go through the FFN)
SKIPS: dict[str, tuple[str, dict[str, Any], bool, bool]] = {
    "naavit": ("naavit", {"layers": (1, 2)}, False, True),
    "naavit, FFN too": ("naavit", {"layers": (1, 2), "skip_ffn": True}, False, False),
    "shortv": ("shortv", {"layers": (1, 2)}, False, False),
    "ima_skip, FFN": ("ima_skip", {"operator": "ffn", "interval": 1, "end": 3}, True, False),
    "ima_skip, block": ("ima_skip", {"operator": "block", "interval": 1, "end": 3}, False, False),
}
SKIPPED = (1, 2)


@contextmanager
def rows_seen(model: Any) -> Iterator[dict[tuple[int, str], int]]:
    """By layer and linear the rows that it is given, over all calls."""
    seen: dict[tuple[int, str], int] = defaultdict(int)

    def count(key: tuple[int, str]) -> Any:
        def hook(module: Any, args: Any) -> None:
            seen[key] += args[0].shape[:-1].numel()

        return hook

    hooks = [
        layer.get_submodule(name).register_forward_pre_hook(count((i, name)))
        for i, layer in enumerate(model.model.language_model.layers)
        for name in (*ATTENTION, *KEYS, *FFN)
    ]
    try:
        yield seen
    finally:
        for hook in hooks:
            hook.remove()


def sizes(family: str, prompt: str) -> tuple[int, int, int, int]:
    """Batch rows, entries, visual tokens, and most text tokens of a row."""
    model, inputs = model_of(family), cached_inputs(family, prompt)
    visual = prompt_of(model, family, inputs).visual
    text = inputs["attention_mask"].bool() & ~visual
    return *visual.shape, int(visual.sum()), int(text.sum(-1).max())


@pytest.mark.parametrize("call", ["generate", "forward"])
@pytest.mark.parametrize("skip", SKIPS)
@pytest.mark.parametrize("family", FAMILIES)
def test_skipped_rows_reach_no_linear(family: str, skip: str, call: str) -> None:
    name, options, attends, has_ffn = SKIPS[skip]
    model, inputs = model_of(family), cached_inputs(family, "batch 1")
    _, entries, visual, _ = sizes(family, "batch 1")
    with vtc.patch(model, name, **options), rows_seen(model) as seen, torch.no_grad():
        if call == "forward":
            model(**inputs)
        else:
            # the first token is that of the prefill
            run(model, inputs, max_new_tokens=1)
    for (layer, linear), rows in seen.items():
        does = {**dict.fromkeys(ATTENTION, attends), **dict.fromkeys(FFN, has_ffn)}
        skipped = layer in SKIPPED and not does.get(linear, True)
        assert rows == entries - visual * skipped, (layer, linear)
    assert len(seen) == len(model.model.language_model.layers) * 7


@pytest.mark.parametrize("prompt", ["ragged", MIXED])
@pytest.mark.parametrize("skip", SKIPS)
@pytest.mark.parametrize("family", FAMILIES)
def test_in_a_batch_rows_are_padded_to_the_longest_text(
    family: str, skip: str, prompt: str
) -> None:
    name, options, attends, has_ffn = SKIPS[skip]
    model, inputs = model_of(family), cached_inputs(family, prompt)
    batch, entries, _, longest = sizes(family, prompt)
    with vtc.patch(model, name, **options), rows_seen(model) as seen, torch.no_grad():
        model(**inputs)
    # text rows and visual rows may be apart there, each padded to the longest
    most = max(prompt_of(model, family, inputs).visual.sum(-1).tolist())
    everything = {batch * entries, batch * (longest + most)}
    for linear in (*ATTENTION, *FFN):
        skipped = not (attends if linear in ATTENTION else has_ffn)
        want = {batch * longest} if skipped else everything
        assert {seen[layer, linear] for layer in SKIPPED} <= want, linear
    for linear in KEYS:
        assert {seen[i, linear] for i in SKIPPED} <= everything


@pytest.mark.parametrize("family", FAMILIES)
def test_later_steps_are_stock(family: str) -> None:
    model, inputs = model_of(family), cached_inputs(family, MIXED)
    batch = len(inputs["input_ids"])
    counted = []
    for steps in (1, 4):
        with vtc.patch(model, "shortv", layers=SKIPPED), rows_seen(model) as seen:
            run(model, inputs, max_new_tokens=steps)
        counted.append(dict(seen))
    assert {after - counted[0][key] for key, after in counted[1].items()} == {3 * batch}


def test_what_is_masked_is_computed_as_ever() -> None:
    """Methods that only read otherwise leave all linears their rows."""
    model, inputs = model_of("llava"), cached_inputs("llava", "batch 1")
    _, entries, *_ = sizes("llava", "batch 1")
    given: list[tuple[str, Any, dict[str, Any]]] = [
        ("yopo", 1.0, {"heads": 1.0}),
        ("var", None, {"dims": (3, 17, 40), "tau": 1.8}),
        ("sink_removal", None, {"dims": (3, 17, 40), "tau": 1.8, "mode": "mask"}),
    ]
    for name, keep, options in given:
        with vtc.patch(model, name, keep, **options), rows_seen(model) as seen, torch.no_grad():
            model(**inputs)
        assert set(seen.values()) == {entries}, name


def multiplications(model: Any, inputs: Any) -> tuple[int, int]:
    """Floating-point operations of linears in decoder layers, and of everything in them."""
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(**inputs)
    layers = [
        ops
        for name, ops in counter.get_flop_counts().items()
        if ".language_model.layers." in name and name.count(".") == LAYER_DOTS
    ]
    plain = {torch.ops.aten.mm, torch.ops.aten.addmm}
    linears = sum(n for ops in layers for op, n in ops.items() if op in plain)
    return linears, sum(n for ops in layers for n in ops.values())


# LlavaForConditionalGeneration.model.language_model.layers.0
LAYER_DOTS = 4


@pytest.mark.parametrize("skip", SKIPS)
@pytest.mark.parametrize("family", FAMILIES)
def test_torch_counts_the_fewer_operations(family: str, skip: str) -> None:
    name, options, attends, has_ffn = SKIPS[skip]
    model, inputs = model_of(family), cached_inputs(family, "batch 1")
    _, _, visual, _ = sizes(family, "batch 1")
    attn, mlp = (getattr(model.model.language_model.layers[0], n) for n in ("self_attn", "mlp"))
    weights = 0
    if not attends:
        weights += attn.q_proj.weight.numel() + attn.o_proj.weight.numel()
    if not has_ffn:
        weights += 3 * mlp.gate_proj.weight.numel()
    stock, stock_in_all = multiplications(model, inputs)
    with vtc.patch(model, name, **options):
        got, in_all = multiplications(model, inputs)
    saved = len(SKIPPED) * visual * 2 * weights
    assert stock - got == saved
    # attention itself is not counted on the CPU
    assert stock_in_all - in_all >= saved
