"""One call swaps the scorer or the selector of a method, and then those decide."""

from __future__ import annotations

import math
import zlib
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn.functional import normalize

import vtc
from tests.kit.matrix import MIXED, cached_inputs, drawn, model_of, run
from tests.kit.oracle import visual_places
from tests.kit.prompts import alone, build_inputs
from tests.methods.views import run_encoder, stated_view
from vtc.errors import OptionError, SignalError
from vtc.scorers import ClsAttention, SinkFilter
from vtc.types import Signal

SEED, KEEP = 5, 0.25
# the methods over tokens, with what each needs
CHOOSING: dict[str, dict[str, Any]] = {"vtc_cls": {}, "flowcut": {}, "todre": {}}
# the methods over decoder layers
SKIPPING = ("naavit", "shortv")
# some of the tiny models' tokens are sinks by this
SINKS = {"dims": (3, 17, 40), "tau": 1.8}


def key_of(pixels: Tensor) -> int:
    """What random numbers of a picture go by."""
    odd = np.uint64(0x9E3779B97F4A7C15)
    bits = pixels.float().flatten().numpy().view(np.int32).astype(np.int64).view(np.uint64)
    mixed = bits ^ (np.arange(len(bits), dtype=np.uint64) * odd)
    mixed *= odd
    mixed ^= (mixed.view(np.int64) >> np.int64(29)).view(np.uint64)
    return int((mixed * odd).sum(dtype=np.uint64) & np.uint64(2**63 - 1))


def numbers(key: int, n: int) -> list[float]:
    """So many random numbers of a picture."""
    draw = torch.Generator().manual_seed(zlib.crc32(f"{SEED} {key}".encode()))
    return torch.rand(n, generator=draw).tolist()


def highest(scores: list[float], k: int) -> list[int]:
    return sorted(sorted(range(len(scores)), key=lambda i: (-scores[i], i))[:k])


def kept(selection: vtc.Selection, group: int = 0) -> list[int]:
    return selection.keep[group, selection.valid[group]].tolist()


def decided(
    family: str, name: str, prompt: str | list[Any], *, keep: Any = KEEP, **options: Any
) -> Any:
    """The handle of a call that has been made, patch removed."""
    model = model_of(family)
    inputs = cached_inputs(family, prompt) if isinstance(prompt, str) else prompt[0]
    with vtc.patch(model, name, keep, seed=SEED, **options) as handle:
        run(model, inputs, max_new_tokens=1)
    return handle


def tokens_of(family: str, inputs: Any) -> list[int]:
    return [len(places) for places in visual_places(model_of(family), family, inputs)]


@pytest.mark.parametrize("name", ["vtc_cls", "flowcut"])
def test_random_scores_are_what_is_kept_by(name: str) -> None:
    """In the encoder too: a patch has the same number in every block, so that cutting little by
    little leaves the highest."""
    family = "llava"
    pixels = cached_inputs(family, MIXED)["pixel_values"]
    own, swapped = (decided(family, name, MIXED, scorer=scorer) for scorer in (None, "random"))
    assert swapped.report().kept_tokens == own.report().kept_tokens
    for g, count in enumerate(own.report().kept_tokens):
        got = kept(swapped.token_selections[-1], g)
        assert got == highest(numbers(key_of(pixels[g]), 36), count)
        assert got != kept(own.token_selections[-1], g)


@pytest.mark.parametrize("family", ["llava_siglip", "qwen2_5_vl", "internvl"])
def test_random_scores_in_the_encoder_and_behind_it(family: str) -> None:
    """Without [CLS] or with tiles, FlowCut has a second cut in the LLM: the same numbers there."""
    inputs = build_inputs(family, [[2, ("image", 24, 24), 3]])
    own = decided(family, "flowcut", [inputs], keep=0.5)
    swapped = decided(family, "flowcut", [inputs], keep=0.5, scorer="random")
    assert swapped.report().kept_tokens == own.report().kept_tokens
    (n,) = tokens_of(family, inputs)
    got = kept(swapped.token_selections[-1])
    assert got == highest(numbers(key_of(inputs["pixel_values"]), n), len(got))
    assert got != kept(own.token_selections[-1]) and len(got) == (n + 1) // 2


def test_rows_of_an_image_have_numbers_of_their_own() -> None:
    family = "llava_next"
    inputs = build_inputs(family, [[2, ("image", 24, 24), 3]])  # no canvas is padded
    own = decided(family, "flowcut", [inputs])
    swapped = decided(family, "flowcut", [inputs], scorer="random")
    assert swapped.report().block_patches[0] == own.report().block_patches[0]
    left = swapped.selections[0].mask()[0].view(5, 9)
    assert left.sum(-1).tolist() == own.selections[0].mask()[0].view(5, 9).sum(-1).tolist()
    first = key_of(inputs["pixel_values"][0])
    for row, there in enumerate(left):
        found = numbers(first + row, 9)
        assert there.nonzero()[:, 0].tolist() == highest(found, int(there.sum()))
    # behind that, the whole image's numbers
    survivors, final = (kept(s) for s in swapped.token_selections)
    (n,) = tokens_of(family, inputs)
    found = numbers(first, n)
    best = sorted(survivors, key=lambda i: (-found[i], i))[: len(final)]
    assert final == sorted(best) and len(final) < len(survivors)


def test_a_picture_gets_the_same_numbers_in_any_batch() -> None:
    for family in ("llava_next", "qwen3_vl"):
        together = decided(family, "flowcut", MIXED, scorer="random")
        inputs = cached_inputs(family, MIXED)
        single = decided(family, "flowcut", [alone(family, inputs, 1)], scorer="random")
        assert kept(together.token_selections[-1], 2) == kept(single.token_selections[-1])


def test_random_scores_choose_the_pivot_of_todre() -> None:
    family, count = "llava", 9
    inputs, said = cached_inputs(family, "batch 1"), []
    model = model_of(family)
    hook = model.model.multi_modal_projector.register_forward_hook(
        lambda module, args, output: said.append(output)
    )
    try:
        own = decided(family, "todre", "batch 1", stage2=False)
        swapped = decided(family, "todre", "batch 1", stage2=False, scorer="random")
    finally:
        hook.remove()
    x = normalize(said[-1][0].double(), dim=-1)
    (pivot,) = highest(numbers(key_of(inputs["pixel_values"]), 36), 1)
    chosen = [pivot]
    while len(chosen) < count:
        likeness = (x @ x[chosen].T).sum(-1)
        chosen.append(min(set(range(36)) - set(chosen), key=lambda i: float(likeness[i])))
    assert kept(swapped.selections[0]) == sorted(chosen)
    assert len(kept(own.selections[0])) == count
    assert kept(own.selections[0]) != sorted(chosen)


def test_top_k_of_todre_keeps_the_highest_scored() -> None:
    """In the place of the farthest from a pivot: what was the pivot's score is everybody's."""
    swapped = decided("llava", "todre", "batch 1", selector="top_k", stage2=False)
    scorer = ClsAttention(Signal("cls_row", (-1,)))
    want = decided("llava", "vtc_cls", "batch 1", scorer=scorer)
    assert kept(swapped.selections[0]) == kept(want.selections[0])
    assert kept(decided("llava", "todre", "batch 1", stage2=False).selections[0]) != kept(
        swapped.selections[0]
    )
    # the second stage stays
    both = decided("llava", "todre", "batch 1", selector="top_k", tau=1.0)
    assert [int(s.slots.sum()) for s in both.selections] == [9, 0]


@pytest.mark.parametrize("name", ["vtc_cls", "flowcut"])
def test_top_k_is_what_these_choose_by(name: str) -> None:
    own, swapped = (decided("llava", name, MIXED, selector=s) for s in (None, "top_k"))
    for mine, theirs in zip(own.selections, swapped.selections, strict=True):
        assert torch.equal(mine.keep, theirs.keep)


def test_another_selector_in_the_encoder() -> None:
    """Equally spaced ones of what is left, cut by cut; how many go is FlowCut's own affair."""
    own = decided("llava", "flowcut", "batch 1")
    swapped = decided("llava", "flowcut", "batch 1", selector="uniform")
    lengths = swapped.report().block_patches
    left = list(range(36))
    for n in lengths:
        left = [left[(2 * i + 1) * len(left) // (2 * n)] for i in range(n)]
    assert kept(swapped.token_selections[-1]) == left
    assert len(left) == 9 and left != kept(own.token_selections[-1])
    spread = decided("llava", "flowcut", "batch 1", selector="max_sum")
    assert len(kept(spread.token_selections[-1])) == 9


def test_attention_alone_in_the_encoder() -> None:
    """What values look like does not count then."""
    attention = [[0.4, 0.3, 0.2, 0.1], [0.1, 0.2, 0.3, 0.4], [0.1, 0.1, 0.7, 0.1]]
    view = stated_view([{"a": a, "m": [1.0, 9.0, 1.0, 9.0]} for a in attention], cls=False, m=1)
    own, swapped = (
        run_encoder(vtc.method("flowcut", scorer=scorer, llm_cut="off"), 1, view, 3)
        for scorer in (None, "cls_attention")
    )
    # a quarter of the first two blocks and half of the last: 0.175 0.175 0.475 0.175
    assert (own[-1], swapped[-1]) == ([[1]], [[2]])


@pytest.mark.parametrize("name", SKIPPING)
def test_layers_by_random_numbers(name: str) -> None:
    calibration = drawn(4)
    own = decided("llava", name, "batch 1", keep=0.5, calibration=calibration)
    swapped = decided("llava", name, "batch 1", keep=0.5, scorer="random")
    active = [i for i, there in enumerate(swapped.plans[0].active) if there]
    assert active == highest(numbers(0, 4), 2)
    by_contribution = [i for i, there in enumerate(own.plans[0].active) if there]
    assert by_contribution == highest(list(calibration.layer_contribution or ()), 2) != active
    same = decided("llava", name, "batch 1", keep=0.5, calibration=calibration, selector="top_k")
    assert same.plans[0].active == own.plans[0].active
    spaced = decided("llava", name, "batch 1", keep=0.5, selector="uniform")
    assert spaced.plans[0].active == (False, True, False, True)


def test_as_many_random_tokens_as_there_are_sinks() -> None:
    pixels = cached_inputs("llava", "batch 1")["pixel_values"]
    own, swapped, same = (
        decided("llava", "sink_removal", "batch 1", keep=None, **SINKS, **options)
        for options in ({}, {"scorer": "random"}, {"selector": "top_k"})
    )
    (count,) = own.report().kept_tokens
    assert 0 < count < 36
    got = kept(swapped.selections[-1])
    assert got == highest(numbers(key_of(pixels[0]), 36), count)
    assert got != kept(own.selections[-1]) == kept(same.selections[-1])


def test_what_does_not_fit_is_refused() -> None:
    with pytest.raises(OptionError, match="keeps 'at_most' of the budget, expected one that"):
        vtc.method("flowcut", selector="grid_pool")
    with pytest.raises(OptionError, match="got a scorer, expected none: its selector 'uniform'"):
        vtc.method("flowcut", scorer="random", selector="uniform")
    with pytest.raises(SignalError, match="needs 'llm_hidden', expected one that needs none but"):
        vtc.patch(model_of("llava"), "flowcut", 0.5, scorer=SinkFilter(dims=(3,)))
    with pytest.raises(SignalError, match="signal 'flow' is unknown"):
        vtc.patch(model_of("llava"), "vtc_cls", 0.5, scorer="flow")


def test_no_call_is_left_out() -> None:
    """Every method that the issue names, one call each."""
    model, inputs = model_of("llava"), cached_inputs("llava", "batch 1")
    calls: dict[str, tuple[Any, dict[str, Any]]] = {
        **{name: (KEEP, {}) for name in CHOOSING},
        **{name: (0.5, {"calibration": drawn(4)}) for name in SKIPPING},
        "sink_removal": (None, SINKS),
    }
    for name, (keep, options) in calls.items():
        for swap in ({"scorer": "random"}, {"selector": "top_k"}):
            with vtc.patch(model, name, keep, **options, **swap) as handle:
                run(model, inputs, max_new_tokens=1)
            assert handle.report().method == name


@pytest.mark.parametrize(
    "name, options, words",
    [
        ("evs", {"q": 1.5}, r"q=1\.5, expected a share in \[0, 1\]"),
        ("fastv", {"k": 0}, "k=0, expected at least 1: no attention is known before layer 0"),
        ("dart", {"text_pivots": -1}, "text_pivots=-1, expected at least 0"),
        ("pact", {"reach": 0.5}, r"layer=4, reach=0\.5, expected at least 1 each"),
        ("pyramiddrop", {"layers": (8, 8)}, r"layers=\(8, 8\), expected ascending numbers"),
        ("pyramiddrop", {"layers": ()}, r"layers=\(\), expected ascending numbers"),
        ("sparsevlm", {"layers": (6, 2, 15)}, r"layers=\(6, 2, 15\), expected three ascending"),
        ("sink_removal", {"layer": 0}, "layer=0, expected at least 1"),
        ("var", {"least": math.nan}, r"least=nan, expected a share in \[0, 1\]"),
        ("yopo", {"window": 4}, "window=4, expected an odd number of at least 1"),
        ("yopo", {"heads": 0.0}, r"heads=0\.0, expected a share in \(0, 1\]"),
        ("ima_skip", {"interval": 0}, "interval=0, expected whole numbers of at least 1"),
    ],
)
def test_what_an_option_cannot_be(name: str, options: dict[str, Any], words: str) -> None:
    with pytest.raises(OptionError, match=f"^method '{name}' got {words}"):
        vtc.method(name, **options)


@pytest.mark.parametrize(
    "name, options, words",
    [
        ("hired", {"alpha": 2.0}, r"crop_quotas got alpha=2\.0, expected a share"),
        ("vispruner", {"important_ratio": 1.5}, r"distinct got share=1\.5, expected one"),
        ("visionzip", {"contextual": 1.0}, r"contextual got share=1\.0, expected one"),
        ("prumerge", {"nearest": -1}, "neighbors got nearest=-1, expected at least 0"),
    ],
)
def test_what_a_part_refuses_names_the_method(
    name: str, options: dict[str, Any], words: str
) -> None:
    with pytest.raises(OptionError, match=f"^method '{name}': {words}"):
        vtc.method(name, **options)
