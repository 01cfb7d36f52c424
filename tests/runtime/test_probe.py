"""Encoder signals: exact, cheap, and invisible to the tower."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import vtc
from vtc import ops
from vtc.adapters.registry import adapter_of
from vtc.errors import SignalError
from vtc.methods.vtc_cls import VtcCls
from vtc.runtime.images import find_images
from vtc.runtime.tower import Tower
from vtc.scorers import ClsAttention
from vtc.types import Budget, Signal


def eager_rows(model: Any, pixels: torch.Tensor) -> torch.Tensor:
    """[CLS] rows of all blocks by the formula, from full attention maps: `[blocks, images,
    patches]`."""
    tower = model.model.vision_tower
    tower.set_attn_implementation("eager")
    maps = tower(pixels, output_attentions=True).attentions
    tower.set_attn_implementation("sdpa")
    return torch.stack([a.float().mean(1)[:, 0, 1:] for a in maps])


@pytest.mark.parametrize("start", [16, 0, 20, 22, -2, -8])
@pytest.mark.parametrize("ensemble", ["sum", "min", "max"])
def test_vtc_cls_equals_the_formula_on_a_24_block_tower(
    make_llava: Any, make_inputs: Any, start: int, ensemble: str
) -> None:
    model = make_llava(blocks=24)
    inputs = make_inputs([[4, None, 5], [2, None, None, 1], [3, None, 1]])
    with torch.no_grad():
        window = eager_rows(model, inputs["pixel_values"])[start:-1]
    scores = {"sum": window.sum(0), "min": window.amin(0), "max": window.amax(0)}[ensemble]
    with vtc.patch(model, "vtc_cls", 9, start=start, ensemble=ensemble) as handle:
        model.generate(**inputs, max_new_tokens=1, do_sample=False)
    (selection,) = handle.selections
    torch.testing.assert_close(selection.scores, scores, atol=1e-6, rtol=1e-5)
    assert torch.equal(selection.keep, scores.topk(9, -1).indices.sort(-1).values)


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("layer", [-1, -3, 5, [-2, -1], [1, 3]])
def test_vtc_cls_ends_at_the_feature_tap(
    make_llava: Any, make_inputs: Any, layer: Any, implementation: str
) -> None:
    model = make_llava(blocks=24, vision_feature_layer=layer)
    inputs = make_inputs([[4, None, 5], [2, None, None, 1]])
    tap = max(i % 25 for i in (layer if isinstance(layer, list) else [layer])) - 1
    with torch.no_grad():
        rows = eager_rows(model, inputs["pixel_values"])
    model.model.vision_tower.set_attn_implementation(implementation)
    for start in (0, 2, 16, 22, -2, -24):
        first = start % 24
        if first > tap:
            with pytest.raises(SignalError, match=f"features are read after block {tap}"):
                vtc.patch(model, "vtc_cls", 9, start=start)
            continue
        with vtc.patch(model, "vtc_cls", 9, start=start) as handle:
            model.generate(**inputs, max_new_tokens=1, do_sample=False)
        want = rows[first : tap + 1].sum(0).topk(9, -1).indices.sort(-1).values
        assert torch.equal(handle.selections[0].keep, want)


def test_an_attention_function_finds_its_own_name_in_the_config(
    llava: Any, make_inputs: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Flash attention loads the kernel that its module's config names."""
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    names = []
    sdpa = ALL_ATTENTION_FUNCTIONS["sdpa"]

    def named(module: Any, *args: Any, **kwargs: Any) -> Any:
        names.append(module.config._attn_implementation)
        return sdpa(module, *args, **kwargs)

    monkeypatch.setitem(ALL_ATTENTION_FUNCTIONS, "named", named)
    for module in llava.model.vision_tower.modules():
        if hasattr(module, "config"):
            module.config._attn_implementation_internal = "named"
    with vtc.patch(llava, "vtc_cls", 9) as handle:
        llava.generate(**make_inputs([[4, None, 5]]), max_new_tokens=1, do_sample=False)
    assert handle.selections[0].scores is not None
    assert names == ["named"] * 6


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_tower_output_is_bit_identical_while_recording(
    make_llava: Any, make_inputs: Any, implementation: str
) -> None:
    model = make_llava()
    model.model.vision_tower.set_attn_implementation(implementation)
    inputs = make_inputs([[1, None, None]])
    pixels, adapter = inputs["pixel_values"], adapter_of(model)
    tower = Tower(adapter, VtcCls(scorer=ClsAttention(Signal("cls_row", range(6)))))
    images = find_images(adapter, inputs, inputs["input_ids"] == 90, None)
    with torch.no_grad():
        want = model.model.vision_tower(pixels, output_hidden_states=True)
        with tower.recording(images, inputs, Budget(1)):
            got = model.model.vision_tower(pixels, output_hidden_states=True)
    assert all(
        torch.equal(a, b) for a, b in zip(got.hidden_states, want.hidden_states, strict=True)
    )
    assert tower.read()["cls_row"].shape == (2, 6, 36)


def test_one_query_row_is_scored_and_only_in_the_blocks_needed(
    llava: Any, make_inputs: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    touched = []
    rows = ops.attention_rows

    def spy(q: torch.Tensor, k: torch.Tensor, scale: float, valid: Any = None) -> torch.Tensor:
        out = rows(q, k, scale, valid)
        touched.append((tuple(q.shape), tuple(k.shape), tuple(out.shape)))
        return out

    monkeypatch.setattr(ops, "attention_rows", spy)
    with vtc.patch(llava, "vtc_cls", 9):
        llava.generate(
            **make_inputs([[4, None, 5], [2, None, 1]]), max_new_tokens=3, do_sample=False
        )
    # start 16 of 24 is block 4 of 6, which is the tap; 2 images, 2 heads of 32, 1 query, 36
    # patches + [CLS]
    assert touched == [((2, 2, 1, 32), (2, 2, 37, 32), (2, 1, 37))]


def test_nothing_asks_for_attention_maps(llava: Any, make_inputs: Any) -> None:
    seen = []
    for module in llava.modules():
        module.register_forward_pre_hook(
            lambda m, args, kwargs: seen.append(kwargs.get("output_attentions")), with_kwargs=True
        )
    with vtc.patch(llava, "vtc_cls", 9):
        llava.generate(**make_inputs([[4, None, 5]]), max_new_tokens=2, do_sample=False)
    assert seen
    assert not any(seen)


def test_methods_without_signals_touch_no_attention(
    llava: Any, make_inputs: Any, monkeypatch: Any
) -> None:
    monkeypatch.setattr(ops, "attention_rows", None)
    names = ("random", "uniform", "average_pool", "downsample")
    # what is swapped for a selector without scores needs none either
    for method in (*names, vtc.method("vtc_cls", selector="uniform")):
        with vtc.patch(llava, method, 9):
            llava.generate(**make_inputs([[4, None, 5]]), max_new_tokens=1, do_sample=False)


@pytest.mark.parametrize(
    "signal, depth, tap, want",
    [
        (Signal("cls_row", range(16, 23), depth=24, ends_at_tap=True), 24, 22, range(16, 23)),
        (Signal("cls_row", range(16, 23), depth=24, ends_at_tap=True), 24, 23, range(16, 24)),
        (Signal("cls_row", range(16, 23), depth=24, ends_at_tap=True), 6, 4, [4]),
        (Signal("cls_row", range(16, 23), depth=24, ends_at_tap=True), 8, 6, [5, 6]),
        (Signal("cls_row", range(-2, -1), depth=24, ends_at_tap=True), 8, 6, [6]),
        (Signal("cls_row", [5], depth=24), 12, 10, [3]),  # 2.5 rounds up
        (Signal("cls_row", [1], depth=24), 6, 4, [1]),  # at least 1
        (Signal("cls_row", [0], depth=24), 6, 4, [0]),
        (Signal("cls_row", [0, 3]), 6, 4, [0, 3]),
    ],
)
def test_published_blocks_scale(signal: Signal, depth: int, tap: int, want: Any) -> None:
    assert signal.resolve(depth, tap) == tuple(want)


@pytest.mark.parametrize("start, blocks", [(23, 24), (22, 6), (-1, 24), (-30, 24)])
def test_a_window_that_leaves_no_block_is_refused_at_patch(
    make_llava: Any, start: int, blocks: int
) -> None:
    with pytest.raises(SignalError, match="leaves no block"):
        vtc.patch(make_llava(blocks=blocks), "vtc_cls", 9, start=start)


# of 8 blocks, the tap at 6: 19 · 8/24 = 6.33 is block 6, 20 · 8/24 = 6.67 is block 7; of 32, tap
# 31: 23 · 32/24 = 30.67 is block 31, 24 would be block 32
@pytest.mark.parametrize("depth, tap, last", [(8, 6, 19), (32, 31, 23), (24, 22, 22), (3, 1, 11)])
def test_the_start_that_an_empty_window_advises_is_the_last_that_works(
    depth: int, tap: int, last: int
) -> None:
    def resolve(start: int) -> tuple[int, ...]:
        return VtcCls(start=start).needs[0].resolve(depth, tap)

    assert resolve(last)[-1] == tap
    with pytest.raises(SignalError, match=f"choose a start of at most {last}$"):
        resolve(last + 1)
    with pytest.raises(SignalError, match=f"at most {last}, or of {-depth} to {tap - depth}$"):
        resolve(-depth - 1)
    assert resolve(-depth) == tuple(range(tap + 1))
    assert resolve(tap - depth) == (tap,)


def test_a_cls_scorer_without_a_stand_in_is_refused_at_patch(
    make_llava: Any, make_inputs: Any
) -> None:
    model = make_llava(
        tower="siglip", vision_feature_layer=-1, vision_feature_select_strategy="full"
    )
    strict = vtc.method("vtc_cls", scorer=ClsAttention(Signal("cls_row", [3])))
    with pytest.raises(SignalError, match=r"\[CLS\]"):
        vtc.patch(model, strict, 9)
    with vtc.patch(model, "random", 9) as handle:
        model.generate(**make_inputs([[4, None, 5]]), max_new_tokens=1, do_sample=False)
    assert handle.report().llm_tokens == (9,)
