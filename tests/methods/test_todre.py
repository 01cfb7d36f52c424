"""ToDRE's two stages against loops that follow the paper's text."""

from __future__ import annotations

import dataclasses
import itertools
import math
from typing import Any

import pytest
import torch

import vtc
from tests.methods.views import layer_view
from vtc.errors import OptionError, SignalError
from vtc.sites import Facts, LayerView
from vtc.types import Budget, Selection, Tokens


def todre(**options: Any) -> vtc.Method:
    return vtc.method("todre", **options)


def facts(layers: int) -> Facts:
    return Facts(24, 22, True, 1, False, layers)


def tokens(*, seed: int = 0, sizes: tuple[int, ...] = (9, 5)) -> Tokens:
    draw = torch.Generator().manual_seed(seed)
    width = max(sizes)
    valid = torch.arange(width) < torch.tensor(sizes)[:, None]
    return Tokens(
        features=torch.randn(len(sizes), width, 4, generator=draw),
        valid=valid,
        grid=tuple((1, 1, n) for n in sizes),
        parent=torch.tensor([[g, g] for g in range(len(sizes))]),
        signals={
            "cls_row": torch.rand(len(sizes), 1, width, generator=draw),
            "image_key": torch.arange(len(sizes)),
        },
    )


def pivots(method: vtc.Method, given: Tokens) -> list[int]:
    return method.select(given, Budget.of(1)).keep[:, 0].tolist()


def test_pivot_is_the_highest_of_the_last_blocks_cls_row() -> None:
    given, method = tokens(), todre()
    assert [(s.name, s.blocks, s.stand_in) for s in method.needs] == [
        ("cls_row", (-1,), "random_row")
    ]
    assert method.needs[0].resolve(24, 22) == (23,)
    rows = given.signals["cls_row"][:, 0]
    assert pivots(method, given) == [int(rows[0].argmax()), int(rows[1, :5].argmax())]


@pytest.mark.parametrize("pivot", ["cls", "random"])
def test_pivot_is_in_the_overview_where_there_is_one(pivot: str) -> None:
    base = tokens()
    for overview in (((0, 3), (2, 5)), ((6, 9), (0, 5)), ((4, 5), (1, 2))):
        found = pivots(todre(pivot=pivot), dataclasses.replace(base, overview=overview))
        assert all(a <= p < b for p, (a, b) in zip(found, overview, strict=True))
    whole = dataclasses.replace(base, overview=((0, 9), (0, 5)))
    assert pivots(todre(pivot=pivot), whole) == pivots(todre(pivot=pivot), base)


def test_random_pivot_is_the_random_methods_first_choice() -> None:
    for seed in range(5):
        given = dataclasses.replace(tokens(), seed=seed)
        assert pivots(todre(pivot="random"), given) == pivots(vtc.method("random"), given)


def test_pivots_by_the_mean() -> None:
    given = tokens()
    near, far = (pivots(todre(pivot=p), given) for p in ("nearest", "farthest"))
    for g, n in enumerate(given.lengths):
        x = torch.nn.functional.normalize(given.features[g, :n].double(), dim=-1)
        distance = (x - x.mean(0)).norm(dim=-1)
        assert (near[g], far[g]) == (int(distance.argmin()), int(distance.argmax()))


def test_stage_2_alone_decides_how_much_is_kept() -> None:
    alone = todre(stage1=False)
    assert (alone.site, todre().site) == ("llm_layer", "llm_input")
    assert (alone.count, alone.needs, alone.exactness) == ("adaptive", (), "layer_mask")
    assert alone.select(tokens(), alone.check_keep(None)).is_identity
    with pytest.raises(OptionError, match="decides by itself how much is kept"):
        alone.check_keep(0.5)
    with pytest.raises(OptionError, match="scorer or selector, expected none"):
        todre(stage1=False, scorer="random")
    with pytest.raises(OptionError, match="stage1=False, stage2=False"):
        todre(stage1=False, stage2=False)


def test_stage_1_alone_is_before_the_llm_only() -> None:
    method = todre(stage2=False)
    assert (method.count, method.exactness) == ("exact", "mask")
    assert method.llm_layers(facts(32)) == ()
    method.check_facts(facts(1))


@pytest.mark.parametrize(
    ("layers", "decided"),
    [(32, 27), (40, 34), (28, 24), (24, 20), (12, 10), (8, 6), (5, 3), (4, 2), (3, 1), (2, 0)],
)
def test_layer_of_stage_2(layers: int, decided: int) -> None:
    """7L/8 counted from 1 and rounded half up; at least one layer is without visual tokens."""
    assert todre().llm_layers(facts(layers)) == (decided,)


def test_an_llm_of_one_layer_is_refused() -> None:
    with pytest.raises(SignalError, match="at least 2 layers, got 1: pass stage2=False"):
        todre().check_facts(facts(1))


def naive_ratios(view: LayerView, b: int) -> tuple[float, float] | None:
    """Both ratios in Python floats, over the full causal map of one row."""
    real = [i for i, there in enumerate(view.mask[b].tolist()) if there]
    past = view.key.shape[2] - view.query.shape[2]
    visual = [i for i in real if view.visual[b, i]]
    text = [i for i in real if visual and i > visual[-1]]
    if not text:
        return None
    heads = view.query.shape[1]

    def mass(rows: list[int], onto: list[int]) -> float:
        total = 0.0
        for h in range(heads):
            for i in rows:
                keys = [*range(past), *(past + j for j in real if j <= i)]
                logits = [
                    float(view.query[b, h, i].double() @ view.key[b, h, j].double()) * view.scale
                    for j in keys
                ]
                top = max(logits)
                weights = [math.exp(x - top) for x in logits]
                mine = sum(
                    w for j, w in zip(keys, weights, strict=True) if j >= past and j - past in onto
                )
                total += mine / sum(weights)
        return total / (heads * len(rows))

    return mass(text, visual), mass(visual, text)


ROWS: list[list[int | None]] = [[3, None, 4], [None, 2, None, 1], [5], [2, None], [1, None, 9]]


@pytest.mark.parametrize("past", [0, 3])
@pytest.mark.parametrize("pad", ["left", "right"])
def test_stage_2_equals_the_loop(past: int, pad: str) -> None:
    view = layer_view(ROWS, past=past, pad=pad)
    found = [naive_ratios(view, b) for b in range(len(ROWS))]
    tv, vt = todre().ratios(view)  # type: ignore[attr-defined]
    for b, pair in enumerate(found):
        if pair:
            assert tv[b].item() == pytest.approx(pair[0], rel=1e-5)
            assert vt[b].item() == pair[1] == 0.0
    taus = sorted(pair[0] for pair in found if pair)
    for tau in (0.0, 1.0, *((a + b) / 2 for a, b in itertools.pairwise(taus))):
        got = todre(tau=tau).layer_cut(view, Budget.of(6))
        for g, (_, b) in enumerate(view.parent.tolist()):
            pair = found[b]
            gone = pair is not None and pair[0] < tau and pair[1] < tau
            assert got[g].tolist() == [not gone] * 6


def test_a_ratio_of_tau_is_not_below_tau() -> None:
    view = layer_view([[2, None, 4]])
    at = todre().ratios(view)[0].item()  # type: ignore[attr-defined]
    for tau, gone in ((at, False), (at * 1.001, True)):
        assert bool(todre(tau=tau).layer_cut(view, Budget.of(6)).any()) != gone


def test_a_row_without_text_after_its_image_is_left_alone() -> None:
    got = todre(tau=1.0).layer_cut(layer_view(ROWS), Budget.of(6))
    assert got.any(-1).tolist() == [False, False, False, True, False]


def test_stage_2_looks_at_what_is_still_there() -> None:
    """Fewer visual tokens, and padding where the others were."""
    view = layer_view([[1, None, 3], [1, None, 2]], n=4)
    visual, valid = view.visual.clone(), view.valid.clone()
    for g in range(2):
        visual[g, view.columns[g, 3]] = False  # a newline, say: text between images
        valid[g, 3] = False
    fewer = dataclasses.replace(view, visual=visual, valid=valid, columns=view.columns * valid)
    tv, _ = todre().ratios(fewer)  # type: ignore[attr-defined]
    for b in range(2):
        pair = naive_ratios(fewer, b)
        assert pair is not None
        assert tv[b].item() == pytest.approx(pair[0], rel=1e-5)
    assert torch.equal(todre(tau=0.0).layer_cut(fewer, Budget.of(3)), valid)


def test_a_row_decides_as_it_would_alone() -> None:
    together = layer_view(ROWS)
    tv, _ = todre().ratios(together)  # type: ignore[attr-defined]
    for b, row in enumerate(ROWS):
        if None in row:
            alone, _ = todre().ratios(layer_view([row]))  # type: ignore[attr-defined]
            torch.testing.assert_close(tv[b], alone[0])


def test_padding_changes_nothing() -> None:
    view = layer_view(ROWS)
    poisoned = {
        name: getattr(view, name).masked_fill(~view.mask[:, None, :, None], math.nan)
        for name in ("query", "key", "value")
    }
    clean, dirty = (
        todre().ratios(v)[0]  # type: ignore[attr-defined]
        for v in (view, dataclasses.replace(view, **poisoned))
    )
    assert torch.equal(clean, dirty)


def test_earlier_caches() -> None:
    assert not todre().drops_earlier_kv
    assert todre(earlier_kv="drop").drops_earlier_kv


def test_objectives_differ_and_may_be_swapped() -> None:
    given, budget = tokens(seed=4), Budget.of(4)

    def kept(**options: Any) -> Selection:
        return todre(**options).select(given, budget)

    assert not torch.equal(kept().keep, kept(objective="k_center").keep)
    assert torch.equal(kept(selector="farthest_point").keep, kept(objective="k_center").keep)
    assert torch.equal(kept(scorer="random").keep, kept(pivot="random").keep)
