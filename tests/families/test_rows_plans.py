"""What methods over decoder layers decide, layer by layer, is what their papers say; and on the
tiny models what they decide has something to act on."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import vtc
from tests.kit.matrix import (
    MIXED,
    SPECS,
    WIDE,
    Decision,
    Spec,
    accepted,
    cached_inputs,
    cells,
    depth_of,
    drawn,
    inside,
    model_of,
    patched,
    run,
)
from tests.kit.models import FAMILIES
from tests.kit.plain import count, middles
from tests.kit.plain_methods import entering, ima_skip, prompt_of, yopo
from tests.kit.plain_rows import Rule, Sinks, Var, is_sink, shared_out
from vtc.plans import Redistribution
from vtc.runtime.reread import handed_on

pytestmark = pytest.mark.filterwarnings("ignore:.*(do_sample|max_length).*")

ROWS = [spec for spec in SPECS if spec.over_layers]
WITH_SINKS = [spec for spec in ROWS if spec.name in ("sink_removal", "var")]


def planned(spec: Spec, family: str, inputs: Any) -> tuple[Any, Decision]:
    model = spec.model(family)
    with vtc.patch(model, spec.method(family), spec.keep) as handle:
        run(model, inputs, max_new_tokens=1)
        call = handle._session.last
    return handle, Decision(None if call is None else call.selection, {}, handle.report())


def mean_active(spec: Spec, family: str, sizes: list[int]) -> float:
    """Visual rows that skip nothing, averaged over layers."""
    depth, rules = depth_of(spec.model(family)), spec.rules(family)
    active = [rules.get(i, Rule()) for i in range(depth)]
    there = spec.cuts(family, cached_inputs(family, "batch 1"))
    behind = min(there, default=depth)
    if spec.name == "sink_removal":
        behind = depth
    layers = sum(r.attention and r.ffn for i, r in enumerate(active) if i < behind)
    return layers / depth * sum(sizes) / len(sizes)


@pytest.mark.parametrize("family, spec", cells(ROWS), ids=str)
def test_the_plan_is_the_papers(family: str, spec: Spec) -> None:
    inputs = cached_inputs(family, "batch 1")
    handle, made = planned(spec, family, inputs)
    rules, removes = spec.rules(family), spec.cuts(family, inputs)
    assert len(handle.selections) == len(removes)
    if not rules:
        assert handle.plans == [] or handle.plans[0].is_stock
        return
    (plan,) = handle.plans
    with torch.no_grad(), inside(spec, family, inputs, made) as record:
        spec.model(family)(**inputs)
    assert len(plan.rules) == depth_of(spec.model(family))
    for layer, got in enumerate(plan.rules):
        want = rules.get(layer, Rule())
        assert (got.attention, got.ffn, got.radius) == (want.attention, want.ffn, want.radius)
        heads = None if got.heads is None else tuple(got.heads.tolist())
        everything = (True,) * 4
        assert (heads or everything) == (want.heads or everything)
        assert want.heads is None or got.renormalize == want.renormalize
        assert record is not None
        sinks = record.sinks.get(layer)
        visual = prompt_of(spec.model(family), family, inputs).visual
        unread = torch.zeros_like(visual) if got.unread is None else got.unread
        assert torch.equal(unread, sinks & visual if want.blind else torch.zeros_like(visual))
        if want.var is not None and bool((sinks & visual).any()):
            assert torch.equal(got.sinks, sinks)
            assert got.redistribution == Redistribution(want.var.rho, want.var.p, want.var.least)
        else:
            assert got.redistribution is None


@pytest.mark.parametrize("family, spec", cells(ROWS), ids=str)
def test_the_report_counts_rows_that_do_everything(family: str, spec: Spec) -> None:
    inputs = cached_inputs(family, "batch 1")
    handle, _ = planned(spec, family, inputs)
    report, rules = handle.report(), spec.rules(family)
    skipping = tuple(i for i, rule in sorted(rules.items()) if not rule.attention)
    assert report.attention_skipped == skipping
    assert report.ffn_skipped == tuple(i for i, rule in sorted(rules.items()) if not rule.ffn)
    assert report.llm_tokens == report.visual_tokens
    if spec.name != "sink_removal":
        want = mean_active(spec, family, list(report.visual_tokens))
        assert report.layer_mean_tokens == pytest.approx(want)
        assert report.active_fraction == pytest.approx(want / report.visual_tokens[0])


@pytest.mark.parametrize("family, spec", cells(WITH_SINKS), ids=str)
def test_some_tokens_are_sinks_and_some_heads_give_away(family: str, spec: Spec) -> None:
    """Else the comparisons would show nothing."""
    visual, text, rows = [], [], []
    for name in [name for name in accepted(family, spec) if name in WIDE]:
        inputs, model = cached_inputs(family, name), spec.model(family)
        prompt = prompt_of(model, family, inputs)
        if spec.rules(family):
            with torch.no_grad(), inside(spec, family, inputs, Decision(None, {}, None)) as record:
                model(**inputs)
            assert record is not None
            found = list(record.sinks.values())
            rows += [row for layer in record.rows.values() for row in layer]
        else:
            found = [~kept for kept in spec.cuts(family, inputs).values()]
        for sinks in found:
            visual += sinks[prompt.visual].tolist()
            text += sinks[prompt.written & ~prompt.visual].tolist()
    assert any(visual) and not all(visual)
    # to remove sinks is to remove visual ones
    assert any(text) == bool(spec.rules(family)) and not all(text)
    if spec.name == "var":
        options = dict(spec.options)
        assert any(done for *_, done in rows)
        assert any(seen < options["least"] for _, seen, _ in rows)
        assert any(
            portion > options["rho"] and seen >= options["least"] for portion, seen, _ in rows
        )


@pytest.mark.parametrize("family", FAMILIES)
def test_removed_sinks_are_those_of_the_layer(family: str) -> None:
    (spec,) = (s for s in WITH_SINKS if s.name == "sink_removal" and not s.rules(family))
    model = spec.model(family)
    for name in ("batch 1", MIXED):
        inputs = cached_inputs(family, name)
        with patched(spec, family) as decision:
            run(model, inputs, max_new_tokens=1)
            made = decision()
        ((layer, kept),) = spec.cuts(family, inputs).items()
        ((cut, selection),) = made.later.items()
        assert cut == layer - 1
        prompt = prompt_of(model, family, inputs)
        gone = prompt.visual & ~kept
        options = spec.given(family)
        sinks = Sinks(options["dims"], options["tau"])
        phi = is_sink(entering(model, inputs, layer), sinks)
        assert torch.equal(gone, phi & prompt.visual)
        assert int(selection.slots.sum()) == int((prompt.visual & kept).sum())


def test_vector_t4() -> None:
    """methods-core.md §10, in a batch with a row that has no visual sink."""
    row = [0.30, 0.25, 0.05, 0.10, 0.10, 0.20]
    a = torch.tensor([row, row])[:, None, None]
    visual = torch.tensor([[0, 1, 1, 1, 1, 0]] * 2).bool()
    sinks = torch.tensor([[1, 1, 0, 0, 0, 0], [1, 0, 0, 0, 0, 1]]).bool()
    for rho, least, done in ((0.5, 0.2, True), (0.49999, 0.2, False), (0.5, 0.51, False)):
        new, chosen = handed_on(a, visual, sinks, Redistribution(rho=rho, p=0.6, least=least))
        got = torch.where(chosen[..., None], new, a)
        want, *_ = shared_out(a, sinks[:, None, None], visual[:, None, None], Var(rho, 0.6, least))
        torch.testing.assert_close(got, want)
        t4 = torch.tensor([0.18, 0.15, 0.094, 0.188, 0.188, 0.20] if done else row)
        torch.testing.assert_close(got[0, 0, 0], t4)
        assert torch.equal(got[1], a[1])


def layers_of(plan: Any, what: str) -> list[int]:
    return [i for i, rule in enumerate(plan.rules) if not getattr(rule, what)]


def plan_of(name: str, keep: Any, depth: int = 8, **options: Any) -> Any:
    model, inputs = model_of("llava", layers=depth), cached_inputs("llava", "batch 1")
    with vtc.patch(model, name, keep, **options) as handle:
        run(model, inputs, max_new_tokens=1)
    return handle.plans[0]


@pytest.mark.parametrize("keep", [0.01, 0.3, 0.4375, 0.5, 0.9])
@pytest.mark.parametrize("name", ["naavit", "shortv"])
def test_the_layers_that_contribute_most_stay(name: str, keep: float) -> None:
    plan = plan_of(name, keep, calibration=drawn(8))
    order = sorted(range(8), key=lambda i: -(drawn(8).layer_contribution or ())[i])
    assert layers_of(plan, "attention") == sorted(order[count(keep, 8) :])


def test_equal_contributions_stay_from_the_front() -> None:
    same = vtc.calibration.Calibration(layer_contribution=(1.0,) * 8)
    assert layers_of(plan_of("shortv", 0.375, calibration=same), "ffn") == [3, 4, 5, 6, 7]


def test_schedules_of_ima() -> None:
    """Layer l is affected iff start < l < end and l mod I = 0 (methods-core.md §7.1)."""
    cases: list[tuple[dict[str, Any], list[int]]] = [
        ({}, [2, 4, 6]),
        ({"interval": 3}, [3, 6]),
        ({"interval": 1, "start": 2, "end": 5}, [3, 4]),
        ({"interval": 2, "end": 8, "start": 2}, [4, 6]),
        # an interval for each half, or quarter
        ({"interval": (3, 1)}, [3, 4, 5, 6]),
        ({"interval": (1, 2, 5, 7)}, [1, 2, 5]),
    ]
    for options, want in cases:
        assert layers_of(plan_of("ima_skip", None, **options), "ffn") == want, options
        assert sorted(ima_skip(8, None, **options)) == want
    for operator, attention, ffn in (("attention", 3, 0), ("ffn", 0, 3), ("block", 3, 3)):
        plan = plan_of("ima_skip", None, operator=operator)
        found = [len(layers_of(plan, "attention")), len(layers_of(plan, "ffn"))]
        assert found == [attention, ffn]
    plan = plan_of("ima_skip", 0.5, interval=None)
    assert layers_of(plan, "ffn") == sorted(set(range(8)) - set(middles(8, 4)))


@pytest.mark.parametrize("heads, kept", [(0.25, 6), (0.5, 12), (0.77, 18), (1.0, 24)])
def test_heads_that_look_most_stay(heads: float, kept: int) -> None:
    """Of 24 heads in layers 2 to 7; those of the first two are never pruned."""
    plan = plan_of("yopo", 1.0, heads=heads, calibration=drawn(8))
    found = [[True] * 4 if r.heads is None else r.heads.tolist() for r in plan.rules]
    assert found[:2] == [[True] * 4] * 2
    assert sum(map(sum, found[2:])) == kept
    ratio = drawn(8).head_ratio
    assert ratio is not None
    of = {
        on: [
            r
            for a, b in zip(ratio[2:], found[2:], strict=True)
            for r, ok in zip(a, b, strict=True)
            if ok == on
        ]
        for on in (True, False)
    }
    assert not of[False] or min(of[True]) > max(of[False])
    rules = yopo(8, 1.0, heads=heads, calibration=drawn(8))
    assert all((rules[i].heads or (True,) * 4) == tuple(found[i]) for i in range(8))


def test_nothing_of_yopo_is_the_stock_model() -> None:
    model, inputs = model_of("llava"), cached_inputs("llava", "batch 1")
    with torch.no_grad():
        want = model(**inputs).logits
        with vtc.patch(model, "yopo", 1.0, window=None, heads=1.0):
            assert torch.equal(model(**inputs).logits, want)
        with vtc.patch(model, "yopo", 1.0, window=11, heads=1.0):
            wide = model(**inputs).logits
    # 6×6 tokens: five rows and columns away is everywhere
    torch.testing.assert_close(wide, want, atol=2e-5, rtol=1e-4)


def first_logits(model: Any, inputs: Any) -> Tensor:
    with torch.no_grad():
        return model(**inputs).logits[:, -1]


def test_state_is_per_prompt() -> None:
    """The official code of VAR reuses the first prompt's sinks for all others."""
    model, spec = model_of("llava"), next(s for s in WITH_SINKS if s.name == "var")
    names = [MIXED, "batch 1", "ragged", MIXED]
    with patched(spec, "llava"):
        together = [first_logits(model, cached_inputs("llava", name)) for name in names]
    for name, got in zip(names, together, strict=True):
        with patched(spec, "llava"):
            assert torch.equal(first_logits(model, cached_inputs("llava", name)), got)
