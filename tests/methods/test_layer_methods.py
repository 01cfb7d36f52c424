"""Methods that cut between decoder layers against loops that follow the papers' text."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import vtc
from tests.methods.views import layer_view
from vtc.entrance import Heads
from vtc.errors import InputError, OptionError, SignalError
from vtc.methods.layer_cuts import LayerCuts
from vtc.selectors.opposed import even_quotas, opposed
from vtc.sites import Facts, LayerView
from vtc.types import Budget

ROWS: list[list[int | None]] = [[3, None, 4], [None, 2, None, 1], [5], [1, None, 9]]
ON_SCHEDULE = [n for n in vtc.methods() if isinstance(vtc.method(n), LayerCuts)]


def facts(layers: int = 32, first: int = 0) -> Facts:
    return Facts(24, 22, True, 1, False, layers, first_layer_cut=first)


def built(name: str, **options: Any) -> LayerCuts:
    method = vtc.method(name, **options)
    assert isinstance(method, LayerCuts)
    return method


def seen(method: LayerCuts, rows: Any = ROWS, **options: Any) -> LayerView:
    """A view of the last layer that the method looks at, with hidden states of its own."""
    view = layer_view(rows, layer=method.cuts(facts())[-1], **options)
    hidden = torch.zeros(*view.mask.shape, 8)
    for b, row in enumerate(view.mask):
        draw = torch.Generator().manual_seed(int(row.sum()))
        hidden[b, row] = torch.randn(int(row.sum()), 8, generator=draw)
    heads = Heads(view.query, view.key, view.value, view.scale)
    return dataclasses.replace(
        view,
        hidden=hidden,
        facts=facts(),
        final_norm=lambda x: 2 * x,
        ahead=lambda rotary: heads,
    )


@pytest.mark.parametrize("past", [0, 3])
@pytest.mark.parametrize("pad", ["left", "right"])
def test_fastv_keeps_what_the_last_entry_attends_to(past: int, pad: str) -> None:
    method = built("fastv")
    view = seen(method, past=past, pad=pad)
    got = method.layer_cut(view, Budget.of(2))
    for g, (_, b) in enumerate(view.parent.tolist()):
        last = int(view.mask[b].nonzero()[-1])
        there = [*range(past), *(past + i for i in view.mask[b].nonzero()[:, 0].tolist())]
        scores = torch.zeros(past + view.mask.shape[1])
        for h in range(2):
            logits = (view.key[b, h, there] @ view.query[b, h, last]) * view.scale
            scores[there] += logits.softmax(0)
        own = scores[view.columns[g] + past]
        assert set(own.topk(2).indices.tolist()) == set(got[g].nonzero()[:, 0].tolist())


@pytest.mark.parametrize("mean, left", [(192, 166), (128, 98), (64, 30)])
def test_the_tables_of_fastv_are_averages_over_layers(mean: int, left: int) -> None:
    """(32·T − 2·576) / 30."""
    method = built("fastv", budget="layer_mean")
    assert method.wanted(576, Budget.of(mean), facts()) == (left,)
    assert method.count == "at_most" and built("fastv").count == "exact"


def test_the_published_pyramid() -> None:
    for method, keep in (
        (built("pyramiddrop"), 0.125),
        (built("pyramiddrop", budget="layer_mean"), 270),
    ):
        assert method.cuts(facts()) == (7, 15, 23)
        assert method.wanted(576, Budget.of(keep), facts()) == (288, 144, 72)


@pytest.mark.parametrize("name", ON_SCHEDULE)
@given(
    n=st.integers(1, 600),
    keep=st.one_of(st.floats(0.01, 1.0), st.integers(1, 700)),
    layers=st.sampled_from([4, 5, 24, 28, 32, 40, 80]),
    first=st.integers(0, 2),
)
def test_stages_do_not_grow_and_end_where_asked(
    name: str, n: int, keep: Any, layers: int, first: int
) -> None:
    model, budget = facts(layers, first), Budget.of(keep)
    method = built(name)
    method.check_facts(model)
    counts = method.wanted(n, budget, model)
    assert list(counts) == sorted(counts, reverse=True)
    assert counts[-1] == budget.count(n) and counts[0] <= n
    cuts = method.cuts(model)
    assert list(cuts) == sorted(cuts) and first <= cuts[0] and cuts[-1] <= layers - 2


@pytest.mark.parametrize("name", ON_SCHEDULE)
@given(n=st.integers(50, 600), keep=st.floats(0.02, 0.99))
def test_the_average_over_layers_is_met_or_refused(name: str, n: int, keep: float) -> None:
    method, model, budget = built(name, budget="layer_mean"), facts(), Budget.of(keep)
    try:
        counts = method.wanted(n, budget, model)
    except OptionError as error:
        assert "as an average over decoder layers" in str(error)
        with pytest.raises(OptionError):
            built(name, budget="layer_mean").llm_layers(model, Budget.of(keep / 2))
        return
    there, total = method.entering(n, budget.count(n) / n, model), 0
    for layer in range(32):
        total += there
        for cut, count in zip(method.cuts(model), counts, strict=True):
            there = count if cut == layer else there
    # each stage is rounded, or is 1
    assert abs(total / 32 - budget.count(n)) <= 1


@pytest.mark.parametrize("name", ON_SCHEDULE)
def test_what_cannot_be_cut_after_is_refused(name: str) -> None:
    with pytest.raises(SignalError, match="expected an LLM with layers behind it"):
        built(name).check_facts(facts(1))
    method = built(name)
    if method._composed:
        with pytest.raises(SignalError, match="got a scorer that needs 'cls_row'"):
            built(name, scorer="cls_attention").check_facts(facts())


@pytest.mark.parametrize("name", ON_SCHEDULE)
def test_a_prompt_that_ends_with_its_image_is_refused(name: str) -> None:
    method = built(name)
    with pytest.raises(InputError, match="prompt that ends with"):
        method.layer_cut(seen(method, [[3, None]]), Budget.of(2))


def test_a_scorer_of_ones_own_between_layers() -> None:
    method = built("fastv", scorer="random")
    assert [need.name for need in method.needs] == ["image_key"]
    view = dataclasses.replace(seen(method), image_key=torch.arange(4))
    first = method.layer_cut(view, Budget.of(2))
    assert first.sum(-1).tolist() == [2] * 4
    assert torch.equal(first, method.layer_cut(view, Budget.of(2)))
    again = method.layer_cut(dataclasses.replace(view, seed=5), Budget.of(2))
    assert not torch.equal(first, again)


@given(st.integers(0, 99), st.integers(1, 9), st.lists(st.integers(0, 3), min_size=1, max_size=4))
def test_opposed_equals_the_loop(seed: int, n: int, quotas: list[int]) -> None:
    draw = torch.Generator().manual_seed(seed)
    x = torch.nn.functional.normalize(torch.randn(n, 3, generator=draw), dim=-1)
    pivots = torch.nn.functional.normalize(torch.randn(len(quotas), 3, generator=draw), dim=-1)
    among = torch.rand(n, generator=draw) < 0.8
    left, taken = among.nonzero()[:, 0].tolist(), set()
    for pivot, quota in zip(pivots, quotas, strict=True):
        for _ in range(min(quota, len(left))):
            best = min(left, key=lambda i: (float((x[i] * pivot).sum()), i))
            left.remove(best)
            taken.add(best)
    assert set(opposed(x, pivots, among, quotas).nonzero()[:, 0].tolist()) == taken


@given(st.integers(0, 300), st.integers(1, 9))
def test_even_quotas(total: int, shares: int) -> None:
    found = even_quotas(total, shares)
    assert sum(found) == total and max(found) - min(found) <= 1
    assert found == sorted(found, reverse=True)


@pytest.mark.parametrize("past", [0, 3])
@pytest.mark.parametrize("pad", ["left", "right"])
def test_dart_equals_the_loop(past: int, pad: str) -> None:
    method = built("dart", image_pivots=2, text_pivots=2)
    view = seen(method, ROWS, n=9, past=past, pad=pad)
    got = method.layer_cut(view, Budget.of(6))
    assert view.hidden is not None
    for g, (_, b) in enumerate(view.parent.tolist()):
        norms = view.key[b, :, past:].abs().sum((0, 2)).tolist()
        own = view.columns[g].tolist()
        last_visual = int(view.visual[b].nonzero()[-1])
        text = [i for i in view.mask[b].nonzero()[:, 0].tolist() if i > last_visual]
        image = sorted(own, key=lambda i: (-norms[i], i))[:2]
        pivots = image + sorted(text, key=lambda i: (-norms[i], i))[:2]
        kept, left = set(image), [i for i in own if i not in image]
        for p, quota in zip(pivots, even_quotas(4, len(pivots)), strict=True):
            like = torch.nn.functional.cosine_similarity
            by = {i: float(like(view.hidden[b, i], view.hidden[b, p], 0)) for i in left}
            for i in sorted(left, key=by.__getitem__)[:quota]:
                kept.add(i)
                left.remove(i)
        assert {own[i] for i in got[g].nonzero()[:, 0].tolist()} == kept
