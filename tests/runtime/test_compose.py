"""Compositions on stock models: equal to the oracle in every way of running, to plain statements of
decisions one after the other, and to the plain method where there is one stage."""

from __future__ import annotations

from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor
from torch.nn.functional import normalize

import vtc
from tests.families import test_matrix_forward as forwards
from tests.families import test_matrix_turns as turns
from tests.kit import plain_methods
from tests.kit.matrix import (
    MIXED,
    MODES,
    cached_inputs,
    depth_of,
    drawn,
    later_masks,
    model_of,
    patched,
    run,
    specs_of,
    want,
)
from tests.kit.oracle import masked, rows_expanded_by_hand
from tests.kit.plain import count
from tests.kit.plain_rows import restated
from tests.kit.prompts import alone, build_inputs
from vtc.errors import InputError, OptionError
from vtc.scorers import ClsAttention
from vtc.sites import BlockView, Cut, Facts
from vtc.types import Budget, Signal

pytestmark = pytest.mark.filterwarnings("ignore:.*(do_sample|max_length).*")

Stage = tuple[Any, ...]
LOGITS = {"return_dict_in_generate": True, "output_logits": True}
FAMILIES = ("llava", "llava_next", "qwen2_5_vl", "qwen3_vl", "internvl")


@dataclass(frozen=True)
class Stages:
    """A composition as the matrix asks for a method."""

    stages: tuple[Stage, ...]
    layers: int | None = 8
    keep: None = None
    over_layers: bool = False

    def __str__(self) -> str:
        return "+".join(stage[0] for stage in self.stages)

    @property
    def name(self) -> str:
        """Whose refusals are expected."""
        return self.stages[0][0]

    def method(self, family: str) -> vtc.Method:
        return vtc.compose(*self.stages)

    def model(self, family: str) -> Any:
        return model_of(family, layers=self.layers)


THREE = Stages((("flowcut", 0.6), ("vtc_cls", 0.4), ("todre", 0.25, {"tau": 1.0})))
COMPOSED = (
    Stages((("flowcut", 0.5), ("todre", 0.2))),
    Stages((("vtc_cls", 0.5), ("todre", 0.25, {"tau": 1.0}))),
    THREE,
)


@pytest.mark.parametrize("spec", COMPOSED, ids=str)
@pytest.mark.parametrize("family", FAMILIES)
def test_generate_equals_the_oracle(family: str, spec: Any) -> None:
    model, inputs = spec.model(family), cached_inputs(family, MIXED)
    with patched(spec, family) as decision:
        got = run(model, inputs)
        made = decision()
    assert torch.equal(got, want(spec, family, inputs, made, "greedy"))
    last = spec.stages[-1][1]
    assert list(made.report.llm_tokens) == [count(last, n) for n in made.report.visual_tokens]
    assert made.report.keep is None and made.report.method == str(spec)


@pytest.mark.parametrize("mode", [mode for mode in MODES if mode != "greedy"])
def test_every_mode(mode: str) -> None:
    for family, spec in (("llava_next", THREE), ("qwen3_vl", COMPOSED[0])):
        prompt = "batch 1" if mode == "prompt lookup" else MIXED
        model, inputs = spec.model(family), cached_inputs(family, prompt)
        with patched(spec, family) as decision:
            got = run(model, inputs, **MODES[mode])
            made = decision()
        assert torch.equal(got, want(spec, family, inputs, made, mode)), (family, mode)


@pytest.mark.parametrize("family", ["llava_next", "qwen2_5_vl"])
def test_a_forward_with_labels_and_a_later_turn(family: str) -> None:
    spec: Any = THREE
    forwards.compare(family, spec, [MIXED])
    turns.compare(family, spec, "a new image", "whole conversation")


@pytest.mark.parametrize("family", FAMILIES)
def test_a_row_of_a_batch_equals_the_row_alone(family: str) -> None:
    spec: Any = Stages((("flowcut", 0.5), ("random", 0.4), ("todre", 0.2)))
    model, inputs = spec.model(family), cached_inputs(family, MIXED)
    with vtc.patch(model, spec.method(family), seed=3) as handle:
        whole = run(model, inputs)
        together = handle.token_selections
        for row, answer in enumerate(whole):
            assert torch.equal(run(model, alone(family, inputs, row))[0], answer)
            mine = [g for g, (_, b) in enumerate(together[0].parent.tolist()) if b == row]
            for all_rows, single in zip(together, handle.token_selections, strict=False):
                pairs = zip([kept(all_rows)[g] for g in mine], kept(single), strict=True)
                assert all(a == b for a, b in pairs)


def kept(selection: vtc.Selection) -> list[list[int]]:
    pairs = zip(selection.keep, selection.valid, strict=True)
    return [indices[there].tolist() for indices, there in pairs]


def answered(model: Any, inputs: Any, method: Any, keep: Any) -> tuple[Any, list[vtc.Selection]]:
    with vtc.patch(model, method, keep, seed=2) as handle:
        return run(model, inputs, **LOGITS), handle.selections


@pytest.mark.parametrize(
    "spec",
    [specs_of(name)[0] for name in vtc.methods() if name not in ("none", "downsample")],
    ids=str,
)
@pytest.mark.parametrize("family", ["llava_next", "qwen3_vl"])
def test_one_stage_is_the_method(family: str, spec: Any) -> None:
    model, inputs, method = spec.model(family), cached_inputs(family, MIXED), spec.method(family)
    plain, left = answered(model, inputs, method, spec.keep)
    composed, stages = answered(model, inputs, vtc.compose((method, spec.keep)), None)
    assert torch.equal(plain.sequences, composed.sequences)
    assert all(torch.equal(a, b) for a, b in zip(plain.logits, composed.logits, strict=True))
    assert [kept(a) for a in left] == [kept(b) for b in stages]


def projected(model: Any, inputs: Any, method: Any) -> tuple[Tensor, Any]:
    """What the projector gives, and the handle."""
    said: list[Tensor] = []
    hook = model.model.multi_modal_projector.register_forward_hook(
        lambda module, args, output: said.append(output)
    )
    try:
        with vtc.patch(model, method) as handle:
            run(model, inputs, max_new_tokens=1)
    finally:
        hook.remove()
    return said[-1], handle


def diverse(x: Tensor, left: list[int], pivot: int, wanted: int) -> list[int]:
    """ToDRE's first stage among some tokens, in plain words."""
    x, chosen = normalize(x.double(), dim=-1), [pivot]
    while len(chosen) < wanted:
        likeness = (x @ x[chosen].T).sum(-1)
        chosen.append(min(set(left) - set(chosen), key=lambda i: float(likeness[i])))
    return sorted(chosen)


def test_two_decisions_before_the_llm() -> None:
    """Each as the paper says it, the second among what the first left."""
    model, inputs = model_of("llava", layers=8), cached_inputs("llava", MIXED)
    stages = ("vtc_cls", 0.5, {"start": -2}), ("todre", 0.2)
    features, handle = projected(model, inputs, vtc.compose(*stages))
    rows = {}
    for block in (-2, -1):
        scorer = ClsAttention(Signal("cls_row", (block,)))
        with vtc.patch(model, "vtc_cls", 1, scorer=scorer) as plain:
            run(model, inputs, max_new_tokens=1)
        rows[block] = plain.selections[0].scores
    first, second, _ = handle.selections
    for g, x in enumerate(features):
        best = rows[-2][g].argsort(descending=True, stable=True)[:18].sort().values.tolist()
        assert kept(first)[g] == best
        pivot = max(best, key=lambda i, g=g: float(rows[-1][g, i]))
        assert kept(second)[g] == diverse(x, best, pivot, 7)


class Thinning(vtc.Method):
    """Drops every third unit after block 1 and every second after block 3; shows what it saw."""

    site = "encoder"
    count = "adaptive"
    exactness = "restatement"
    views: ClassVar[dict[int, BlockView]] = {}

    def encoder_blocks(self, facts: Facts) -> tuple[int, ...]:
        return tuple(range(facts.encoder_depth))

    def encoder_cut(self, view: BlockView, budget: Budget) -> Cut:
        self.views[view.block] = view
        every = {1: 3, 3: 2}.get(view.block)
        return Cut(None if every is None else view.valid & (view.index % every > 0), {})


def attended(view: BlockView, row: int) -> dict[int, float]:
    """By unit, the attention of [CLS], or of the mean query, to what is left of a row."""
    c, m = int(view.has_cls), view.patches
    places = [u for u, there in enumerate(view.valid[row].tolist()) if there]
    patches = [c + u * m + i for u in places for i in range(m)]
    entries = [0] * c + patches
    total = torch.zeros(len(entries), dtype=torch.double)
    for q, k in zip(view.query[row].double(), view.key[row].double(), strict=True):
        asks = q[0] if view.has_cls else q[patches].mean(0)
        total += (k[entries] @ asks * view.scale).softmax(-1)
    shares = (total[c:] / len(view.query[row])).view(-1, m).mean(-1).tolist()
    return dict(zip(view.index[row, places].tolist(), shares, strict=True))


@pytest.mark.parametrize("family", ["llava", "llava_siglip", "qwen2_5_vl", "qwen3_vl", "internvl"])
def test_attention_behind_cuts_is_among_what_is_left(family: str) -> None:
    """The second stage reads blocks between which the first one cuts."""
    window = Signal("cls_row", (1, 2, 3, 4), stand_in="mean_query_row")
    model = model_of(family)
    both = vtc.compose(Thinning(), ("vtc_cls", 0.125, {"scorer": ClsAttention(window)}))
    inputs = build_inputs(family, [[2, ("image", 40, 48), 3], [1, ("image", 24, 48), 4]])
    with vtc.patch(model, both) as handle:
        run(model, inputs, max_new_tokens=1)
    survivors, final = handle.token_selections
    views = {b: Thinning.views[b] for b in window.blocks}
    assert len({int(view.valid.sum()) for view in views.values()}) == 3
    rows = views[1].image.tolist()
    for g, n in enumerate(survivors.lengths):
        scores: dict[int, float] = {}
        for view in views.values():
            start = 0
            for row in [r for r, image in enumerate(rows) if image == g]:
                for unit, share in attended(view, row).items():
                    scores[start + unit] = scores.get(start + unit, 0) + share
                start += int(view.units[row])
        left = kept(survivors)[g]
        best = sorted(left, key=lambda i, s=scores: -s[i])[: count(0.125, n)]
        assert kept(final)[g] == sorted(best)
        assert set(left) < set(scores) == set(range(n))


def test_the_first_stage_is_what_it_is_alone() -> None:
    for family in ("llava_next", "qwen3_vl"):
        model, inputs = model_of(family, layers=8), cached_inputs(family, MIXED)
        _, (encoder, *_) = answered(model, inputs, "flowcut", 0.5)
        _, stages = answered(model, inputs, vtc.compose(("flowcut", 0.5), ("todre", 0.1)), None)
        assert torch.equal(stages[0].keep, encoder.keep)
        assert [s.slots.sum() for s in stages[1:]] == [stages[1].slots.sum()] * 3


def test_a_stage_that_keeps_everything_is_not_run() -> None:
    """Not even reordered: patches of a token stand apart in this encoder."""
    model, inputs = model_of("internvl", layers=8), cached_inputs("internvl", MIXED)
    for stages in (
        (("flowcut", 1.0), ("todre", 0.2)),
        (("vtc_cls", 10_000), ("todre", 0.2)),
        (("todre", 1.0, {"tau": 1.0}), ("todre", 0.2)),
    ):
        plain, left = answered(model, inputs, "todre", 0.2)
        composed, found = answered(model, inputs, vtc.compose(*stages), None)
        assert all(torch.equal(a, b) for a, b in zip(plain.logits, composed.logits, strict=True))
        # FlowCut's cut in the LLM is looked at all the same, and cuts nothing
        assert [kept(a) for a in left] == [kept(b) for b in (*found[:1], *found[-len(left) + 1 :])]
    whole = vtc.compose(("flowcut", 1.0), ("todre", 1.0, {"tau": 1.0}))
    with vtc.patch(model, whole) as handle:
        got = run(model, inputs, **LOGITS)
        assert handle.selections[0].is_identity
    stock = run(model, inputs, **LOGITS)
    assert all(torch.equal(a, b) for a, b in zip(got.logits, stock.logits, strict=True))


def test_two_stages_that_cut_after_the_same_layer() -> None:
    """In an LLM of three layers FlowCut's second cut and ToDRE's come after the same one."""
    for tau in (0.0, 0.9, 1.0):
        spec: Any = Stages(
            (("flowcut", 0.25), ("todre", None, {"stage1": False, "tau": tau})), layers=3
        )
        model, inputs = spec.model("llava_next"), cached_inputs("llava_next", MIXED)
        with patched(spec, "llava_next") as decision:
            got = run(model, inputs)
            made = decision()
        assert list(made.later) == [1]
        assert torch.equal(got, want(spec, "llava_next", inputs, made, "greedy"))
        left, n = made.later[1].slots.tolist(), made.report.visual_tokens
        if tau != 0.9:
            assert left == ([0, 0, 0] if tau else [count(0.25, each) for each in n])


@contextmanager
def rows_and_cuts(model: Any, family: str, inputs: Any, made: Any, rules: Any) -> Any:
    with (
        rows_expanded_by_hand(model, family),
        later_masks(model, family, inputs, made.later),
        restated(model, plain_methods.prompt_of(model, family, inputs), rules),
    ):
        yield


@pytest.mark.parametrize("family", ["llava_next", "qwen2_5_vl"])
def test_tokens_are_dropped_and_rows_skip(family: str) -> None:
    spec: Any = Stages(
        (("vtc_cls", 0.5), ("todre", 0.4, {"tau": 1.0}), ("shortv", 0.5, {"calibration": drawn(8)}))
    )
    model, inputs = spec.model(family), cached_inputs(family, MIXED)
    with vtc.patch(model, spec.method(family)) as handle, patched_calls(handle) as decision:
        got = run(model, inputs)
        made = decision()
    rules = plain_methods.ROWS["shortv"](depth_of(model), 0.5, calibration=drawn(8))
    with rows_and_cuts(model, family, inputs, made, rules):
        assert torch.equal(got, run(model, masked(model, family, inputs, made.first)))
    (plan,) = handle.plans
    assert sum(plan.active) == 4
    assert len(handle.selections) == 3


@contextmanager
def patched_calls(handle: Any) -> Any:
    """As `patched`, of a handle."""

    @dataclass
    class Made:
        first: Any
        later: Any

    def decision() -> Made:
        call = handle._session.last
        return Made(call.selection, dict(sorted(call.later.items())))

    yield decision


def test_fractions_and_tokens_that_rise_on_an_image() -> None:
    """Found before anything has run."""
    model, inputs = model_of("qwen2_5_vl"), cached_inputs("qwen2_5_vl", MIXED)
    ran: list[bool] = []
    hook = model.model.visual.register_forward_hook(lambda *given: ran.append(True))
    mixed = vtc.compose(("vtc_cls", 0.5), ("random", 6))
    message = r"image 0 of the call has 9 tokens: stage 'vtc_cls' \(keep=0.5\) keeps 5 of them and"
    try:
        with vtc.patch(model, mixed):
            for call in (run, lambda model, inputs: model(**inputs)):
                with pytest.raises(InputError, match=message):
                    call(model, inputs)
            assert not ran
            run(model, build_inputs("qwen2_5_vl", [[1, ("image", 32, 48), 3]]))
    finally:
        hook.remove()


def test_the_handle_of_a_composition() -> None:
    model, inputs = model_of("llava", layers=8), cached_inputs("llava", "batch 1")
    both = vtc.compose(("flowcut", 0.5), ("todre", 4, {"tau": 1.0}))
    with pytest.raises(OptionError, match=r"got keep=0\.5, expected none: its stages carry their"):
        vtc.patch(model, both, 0.5)
    with pytest.raises(OptionError, match=r"options \['tau'\] were given beside a method object"):
        vtc.patch(model, both, tau=0.3)
    with vtc.patch(model, both, positions="published") as handle:
        with pytest.raises(OptionError, match="compose it anew with other keeps"):
            handle.set(keep=0.3)
        run(model, inputs, max_new_tokens=1)
    assert [int(s.slots.sum()) for s in handle.selections] == [18, 4, 0]
    assert handle.selections[0].grid == ((1, 6, 6),)  # patches
    report = handle.report()
    assert (report.method, report.llm_tokens, report.kept_tokens) == ("flowcut+todre", (4,), (4,))
    assert "flowcut+todre" in str(report) and report.block_patches[-1] == 18
    assert report.layer_tokens == (4,) * 7 + (0,)


def test_a_model_that_a_stage_cannot_work_on_is_refused() -> None:
    with pytest.raises(vtc.errors.SignalError, match="cuts after decoder layer 1, expected an LLM"):
        vtc.patch(model_of("llava_siglip", layers=2), vtc.compose(("flowcut", 0.5), ("todre", 0.1)))
    shallow = vtc.compose(replace(vtc.method("var"), dims=(99,)))
    with pytest.raises(OptionError, match=r"each in 0\.\.63"):
        vtc.patch(model_of("llava"), shallow)
