"""FlowCut against a restatement in loops and Python floats, row by row and head by head."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import vtc
from tests.methods.views import Rows, layer_view, run_encoder
from vtc.errors import InputError, OptionError, SignalError
from vtc.scorers.flow import drop_amount, flow_score, layer_tokens
from vtc.selectors.shares import even_shares, roomy_shares
from vtc.sites import Facts, LayerView
from vtc.types import Budget


def flowcut(**options: Any) -> Any:
    return vtc.method("flowcut", **options)


def facts(**changes: Any) -> Facts:
    return dataclasses.replace(Facts(24, 22, True, 1, False, 32), **changes)


def dot(a: torch.Tensor, b: torch.Tensor) -> float:
    return sum(float(x) * float(y) for x, y in zip(a, b, strict=True))


def softmax(logits: list[float]) -> list[float]:
    top = max(logits)
    weights = [math.exp(x - top) for x in logits]
    return [w / sum(weights) for w in weights]


def mean(rows: Sequence[Sequence[float]]) -> list[float]:
    return [sum(column) / len(rows) for column in zip(*rows, strict=True)]


def size(values: torch.Tensor, j: int) -> float:
    """L1 norm of the value of entry j averaged over heads."""
    return sum(abs(x) for x in mean([head[j].tolist() for head in values]))


def naive_block(rows: Rows, r: int, block: int, left: list[int]) -> tuple[list[float], list[float]]:
    """Attention p and score S of each patch that is left of one row."""
    c, m, d = int(rows.cls), rows.m, 8
    entries = [*range(c), *(c + u * m + i for u in left for i in range(m))]
    query, key, value = rows.part(r, block)[:, :, entries]
    heads = range(len(query))
    if not c:
        a = mean(
            [softmax([dot(query[h].double().mean(0), k) / d**0.5 for k in key[h]]) for h in heads]
        )
        return a, [x * size(value, j) for j, x in enumerate(a)]
    a = mean([softmax([dot(query[h, 0], k) / d**0.5 for k in key[h]]) for h in heads])[1:]
    g = mean([softmax([dot(value[h, 0], v) for v in value[h]]) for h in heads])[1:]
    score = [
        (x / sum(a) + y / sum(g)) * size(value, j + 1)
        for j, (x, y) in enumerate(zip(a, g, strict=True))
    ]
    return [x / sum(a) for x in a], score


def naive_encoder(
    rows: Rows, targets: list[int], batch_coupled: bool = False
) -> list[list[list[int]]]:
    """What is left of each row after each block."""
    left: list[list[int]] = [list(range(n)) for n in rows.units]
    image = [i for i, n in enumerate(rows.images or [1] * len(left)) for _ in range(n)]
    image = [0] * len(left) if batch_coupled else image
    total: list[dict[int, float]] = [{} for _ in left]
    found = []
    for block in range(rows.tap):
        remaining, amounts = rows.tap - 1 - block, []
        for r, units in enumerate(left):
            p, score = naive_block(rows, r, block, units)
            for i, unit in enumerate(units):
                new = sum(score[i * rows.m : (i + 1) * rows.m]) / rows.m
                old = total[r].get(unit)
                total[r][unit] = new if old is None else 0.5 * old + 0.5 * new
            n, target = len(units) * rows.m, targets[r] * rows.m
            if n > target and remaining:
                entropy = -sum(x * math.log(x) for x in p if x > 0)
                share = 1 - (entropy / math.log(n)) ** 2
                amounts.append(round((n - target) / math.sqrt(remaining) * share / rows.m))
            else:
                amounts.append(0)
        if remaining % 2 == 0:
            for r, units in enumerate(left):
                drop = max(x for x, i in zip(amounts, image, strict=True) if i == image[r])
                stay = max(len(units) - drop, targets[r]) if remaining else targets[r]
                best = sorted(units, key=lambda u, r=r: (-total[r][u], u))[:stay]
                left[r] = sorted(best)
        found.append([list(units) for units in left])
    return found


LAYOUTS = [
    pytest.param(Rows([9, 4, 7], tap=6), id="cls-6blocks"),
    pytest.param(Rows([9, 4, 7], tap=5, extra=2, filler=math.nan), id="cls-5blocks-nan"),
    pytest.param(Rows([5, 8, 3], m=4, tap=4), id="cls-shuffle"),
    pytest.param(Rows([5, 8, 3], m=4, cls=False, tap=5, filler=1e9), id="nocls-merger"),
    pytest.param(Rows([11, 2], cls=False, tap=3), id="nocls"),
    pytest.param(Rows([6], tap=1), id="one-block"),
]


@pytest.mark.parametrize("rows", LAYOUTS)
@pytest.mark.parametrize("keep", [1, 2, 0.4])
@pytest.mark.parametrize("llm_cut", ["off", "on"])
def test_encoder_equals_the_loop(rows: Rows, keep: Any, llm_cut: str) -> None:
    counts = [Budget.of(keep).count(n) for n in rows.units]
    more = 2 if llm_cut == "on" else 1
    targets = [min(more * k, n) for k, n in zip(counts, rows.units, strict=True)]
    got = run_encoder(flowcut(llm_cut=llm_cut), keep, rows.view, rows.tap)
    assert got == naive_encoder(rows, targets)
    assert [len(units) for units in got[-1]] == targets


@pytest.mark.parametrize("rows", LAYOUTS[:4])
def test_coupled_rows_drop_what_the_most_concentrated_does(rows: Rows) -> None:
    method = flowcut(llm_cut="off", batch_coupled=True)
    targets = [1] * len(rows.units)
    got = run_encoder(method, 1, rows.view, rows.tap)
    assert got == naive_encoder(rows, targets, batch_coupled=True)
    assert got != naive_encoder(rows, targets)


@pytest.mark.parametrize("m", [1, 4])
def test_crops_of_an_image_drop_together_and_images_apart(m: int) -> None:
    rows = Rows([9, 9, 9, 9, 9], seeds=[0, 1, 2, 3, 4], images=[3, 2], m=m)
    got = run_encoder(flowcut(llm_cut="off"), 5, rows.view, rows.tap)
    assert got == naive_encoder(rows, [2, 2, 1, 3, 2])
    apart = dataclasses.replace(rows, images=())
    assert got != naive_encoder(apart, [2, 2, 1, 3, 2])
    first, second = (
        dataclasses.replace(rows, units=[9] * n, seeds=seeds, images=[n])
        for n, seeds in ((3, [0, 1, 2]), (2, [3, 4]))
    )
    alone = [
        run_encoder(flowcut(llm_cut="off"), 5, part.view, part.tap) for part in (first, second)
    ]
    assert got == [a + b for a, b in zip(*alone, strict=True)]


@settings(max_examples=20)
@given(data=st.data())
def test_random_layouts_equal_the_loop(data: st.DataObject) -> None:
    units = data.draw(st.lists(st.integers(1, 9), min_size=1, max_size=3))
    rows = Rows(
        units,
        seeds=data.draw(st.lists(st.integers(0, 50), min_size=len(units), max_size=len(units))),
        m=data.draw(st.sampled_from([1, 4])),
        cls=data.draw(st.booleans()),
        tap=data.draw(st.integers(1, 4)),
        extra=data.draw(st.integers(0, 2)),
    )
    keep = data.draw(st.integers(1, 4))
    got = run_encoder(flowcut(llm_cut="off"), keep, rows.view, rows.tap)
    assert got == naive_encoder(rows, [min(keep, n) for n in units])


def test_what_pads_a_canvas_does_not_compete() -> None:
    """Units that stand between others and reach no LLM token, whatever they hold."""
    rows = Rows([8], tap=1)
    whole = rows.view()
    out = torch.tensor([[True, False, True, True, False, True, True, False]])
    entries = torch.cat([torch.tensor([[True]]), out], 1)[:, None, :, None]
    gaps = dataclasses.replace(
        whole,
        valid=out,
        **{
            name: getattr(whole, name).masked_fill(~entries, math.nan)
            for name in ("query", "key", "value")
        },
    )
    got = flowcut().encoder_cut(gaps, Budget.of(2)).keep[0].nonzero()[:, 0].tolist()
    left = out[0].nonzero()[:, 0].tolist()
    want = flowcut().encoder_cut(rows.view(left=[left]), Budget.of(2)).keep[0]
    assert got == [left[i] for i in want.nonzero()[:, 0]]


def test_vectors() -> None:
    a = torch.tensor([0.02, 0.10, 0.05, 0.20, 0.01, 0.12])
    g = torch.tensor([0.05, 0.05, 0.20, 0.10, 0.02, 0.08])
    m = torch.tensor([3, 1, 2, 1.5, 4, 2.5])
    torch.testing.assert_close(flow_score(a, g, m), torch.tensor([0.42, 0.30, 1, 0.90, 0.24, 1]))
    p, n, target = (a / a.sum())[None], torch.tensor([6]), torch.tensor([2])
    for remaining, want in ((20, 0.2939), (8, 0.4647), (2, 0.9294)):
        assert drop_amount(p, n, target, remaining).item() == pytest.approx(want, abs=5e-5)
    # no attention at all on a patch, as fp16 may give, is no NaN
    assert drop_amount(torch.tensor([[1.0, 0.0]]), n, target, 4).item() == 2.0


@pytest.mark.parametrize(
    ("wanted", "sizes", "want"),
    [
        (64, [576], [128]),
        (400, [576], [576]),
        (160, [576] * 5, [80] * 5),  # the published 2.5T
        (161, [576] * 5, [80] * 5),
        (1, [576] * 5, [1] * 5),
        (3, [9, 9], [2, 2]),  # 1 each would leave 2
        (160, [729] * 10, [40] * 10),  # 80 each would be 5T
        (100, [729] * 6, [42] * 6),
        (50, [100, 2, 2, 2], [44, 2, 2, 2]),  # 25 each would leave 31
        (90, [100, 0], [90, 0]),
    ],
)
def test_shares_before_a_later_cut(wanted: int, sizes: list[int], want: list[int]) -> None:
    assert roomy_shares(wanted, sizes) == want


def test_shares_of_the_only_cut() -> None:
    assert even_shares(7, [4, 4, 2]) == [3, 3, 1]
    assert even_shares(3, [6, 0, 6]) == [2, 0, 1]
    with pytest.raises(OptionError, match="keep=2 tokens were to be shared by 3 crops or frames"):
        even_shares(2, [4, 4, 4])


@pytest.mark.parametrize(
    ("rows", "options", "want"),
    [
        (Rows([8, 8, 8], images=[3]), {}, [3, 3, 3]),  # crops: half of 6
        (Rows([8, 8, 8], images=[1, 2]), {}, [2, 2, 2]),  # 8 -> 2 alone; 16 -> 4 -> 2 and 2
        (Rows([8, 8, 8], images=[3]), {"llm_cut": "off"}, [2, 2, 2]),
        (Rows([8, 8, 8], images=[3], video=True), {}, [2, 2, 2]),
        (Rows([8, 8, 8], images=[3], video=True, cls=False), {}, [3, 3, 3]),
        (Rows([8, 12], cls=False), {}, [4, 6]),
        (Rows([8, 12]), {}, [2, 3]),
        (Rows([8, 12]), {"llm_cut": "on"}, [4, 6]),
        (Rows([8, 12], cls=False), {"llm_cut": "off"}, [2, 3]),
    ],
)
def test_targets(rows: Rows, options: dict[str, Any], want: list[int]) -> None:
    method = flowcut(**options)
    assert method.targets(rows.view(), Budget.of(0.25)).tolist() == want
    left = run_encoder(method, 0.25, rows.view, rows.tap)[-1]
    assert [len(units) for units in left] == want


def test_rows_at_or_below_their_target_are_not_cut() -> None:
    rows = Rows([3, 9, 4], tap=3)
    got = run_encoder(flowcut(), 4, rows.view, 3)
    assert all([len(left[0]), len(left[2])] == [3, 4] for left in got)
    small = Rows([3, 4], tap=1).view()
    cut = flowcut().encoder_cut(small, Budget.of(4))
    assert cut.keep is None
    assert cut.carry["score"].shape == (2, 4)


def test_where_it_cuts() -> None:
    method = flowcut()
    assert method.encoder_blocks(facts()) == tuple(range(22))
    assert method.llm_layers(facts()) == ()
    assert method.llm_layers(facts(tiled=True)) == (1,)
    assert method.llm_layers(facts(has_cls=False)) == (1,)
    assert flowcut(llm_cut="on").llm_layers(facts()) == (1,)
    assert flowcut(llm_cut="off").llm_layers(facts(has_cls=False, tiled=True)) == ()
    rows = Rows([6], tap=4)  # the last cut is after block 3, and every second before
    cuts = [method.encoder_cut(rows.view(b), Budget.of(2)).keep is None for b in range(4)]
    assert cuts[0] and cuts[2] and not cuts[3]


def test_models_too_small_are_refused() -> None:
    flowcut().check_facts(facts(llm_depth=1))
    with pytest.raises(SignalError, match="at least 3 layers, got 2: pass llm_cut='off'"):
        flowcut().check_facts(facts(llm_depth=2, tiled=True))
    flowcut(llm_cut="off").check_facts(facts(llm_depth=2, tiled=True))
    with pytest.raises(SignalError, match="block 1 or later, got block 0"):
        flowcut().check_facts(facts(tap=0))


def naive_layer(view: LayerView, group: int, normalize: bool) -> list[float]:
    """Score of each visual token of a group."""
    b = int(view.parent[group, 1])
    past = view.key.shape[2] - view.query.shape[2]
    last = max(i for i, there in enumerate(view.mask[b].tolist()) if there)
    at = (view.columns[group][view.valid[group]] + past).tolist()
    heads = range(view.query.shape[1])
    q, k, v = view.query[b, :, last], view.key[b], view.value[b]
    r = mean([softmax([dot(q[h], k[h, j]) * view.scale for j in at]) for h in heads])
    g = mean([softmax([dot(v[h, past + last], v[h, j]) * view.scale for j in at]) for h in heads])
    if normalize:
        r, g = [x / sum(r) for x in r], [x / sum(g) for x in g]
    return [(x + y) * size(v, j) for x, y, j in zip(r, g, at, strict=True)]


PROMPTS: list[list[int | None]] = [[3, None, 4], [None, 2, None, 1], [5], [1, None, 9]]


@pytest.mark.parametrize("past", [0, 3])
@pytest.mark.parametrize("pad", ["left", "right"])
@pytest.mark.parametrize("normalize", [True, False])
def test_layer_cut_equals_the_loop(past: int, pad: str, normalize: bool) -> None:
    """With the shares of the [CLS] variant, and without as on Qwen: it is the same."""
    view = layer_view(PROMPTS, past=past, pad=pad)
    got = flowcut().layer_cut(view, Budget.of(2))
    scores = layer_tokens(view).signals["flow"]
    for g in range(len(view.valid)):
        want = naive_layer(view, g, normalize)
        torch.testing.assert_close(scores[g], torch.tensor(want), atol=1e-6, rtol=1e-5)
        best = sorted(range(6), key=lambda j, w=want: (-w[j], j))[:2]
        assert got[g].nonzero()[:, 0].tolist() == sorted(best)


def test_layer_cut_of_what_the_encoder_left() -> None:
    view = layer_view(PROMPTS)
    valid = view.valid.clone()
    valid[0, 4:], valid[2, 2:] = False, False
    columns = view.columns.masked_fill(~valid, 0)
    poisoned = {
        name: getattr(view, name).masked_fill(~view.mask[:, None, :, None], math.nan)
        for name in ("query", "key", "value")
    }
    left = dataclasses.replace(view, valid=valid, columns=columns, **poisoned)
    got = flowcut().layer_cut(left, Budget.of(3))
    assert got.sum(-1).tolist() == [3, 3, 2, 3]
    assert not (got & ~valid).any()
    for g in (0, 1, 3):
        want = naive_layer(left, g, True)
        best = sorted(range(len(want)), key=lambda j, w=want: (-w[j], j))[:3]
        assert got[g].nonzero()[:, 0].tolist() == sorted(best)


def test_layer_cut_leaves_alone_what_is_few_enough() -> None:
    view = layer_view([[3, None]])
    assert torch.equal(flowcut().layer_cut(view, Budget.of(6)), view.valid)
    with pytest.raises(InputError, match="a prompt that ends with it: put text there"):
        flowcut().layer_cut(view, Budget.of(5))
