"""Tokens that are dropped and rows that skip, in one composition: equal to the stock language model
on what each cut left, its layers written out in plain words."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor

import vtc
from tests.kit.fed import Fed, arguments, deepstack, fed, recorded
from tests.kit.matrix import (
    MIXED,
    MODES,
    SAME_AS,
    WIDE,
    Decision,
    cached_inputs,
    cells,
    depth_of,
    drawn,
    later_masks,
    model_of,
    run,
    run_fed,
)
from tests.kit.models import FAMILIES
from tests.kit.options import SINKS
from tests.kit.oracle import kept_columns, rows_expanded_by_hand, visual_places
from tests.kit.plain import average_pool, count
from tests.kit.plain_methods import ROWS, prompt_of, sinks_of, together
from tests.kit.plain_rows import Record, Rule, is_sink, restated
from tests.kit.prompts import Inputs, prompts

pytestmark = pytest.mark.filterwarnings("ignore:.*(do_sample|max_length).*")

Stage = tuple[Any, ...]
DRAWN = {"calibration": "drawn"}
VAR = {"rho": 0.4, "p": 0.3, "least": 0.1, **SINKS}
COMPOSED: dict[str, tuple[Stage, ...]] = {
    "two cuts, then frozen": (
        ("flowcut", 0.6),
        ("todre", 0.4, {"tau": 1.0}),
        ("shortv", None, {"layers": (1, 3)}),
    ),
    "a cut, then two that skip": (
        ("vtc_cls", 0.5),
        ("naavit", None, {"layers": (0, 2)}),
        ("ima_skip", None, {"interval": 1}),
    ),
    "a cut, then sinks give away": (("random", 0.6), ("var", None, VAR)),
    "two that skip, and sinks": (("naavit", 0.5, DRAWN), ("ima_skip", None), ("var", None, VAR)),
    "sinks removed, then frozen": (
        ("uniform", 0.8),
        ("sink_removal", None, SINKS),
        ("shortv", None, {"layers": (2, 3)}),
    ),
    "sinks not read, neighbors": (
        ("vtc_cls", 0.7),
        ("yopo", 0.75, {"window": 3, "heads": 0.5, "renormalize": False, **DRAWN}),
        ("sink_removal", None, {"mode": "mask", **SINKS}),
    ),
    "merged, then frozen": (("average_pool", 0.5), ("shortv", 0.5, DRAWN)),
}
# what stands in the place of merged tokens is said by the statement of the method that merges
MERGING = "merged, then frozen"


def stages_of(name: str, depth: int) -> list[Stage]:
    """With calibrations for this many layers."""
    return [
        (*stage[:2], {k: drawn(depth) if v == "drawn" else v for k, v in stage[2].items()})
        if len(stage) > 2
        else stage
        for stage in COMPOSED[name]
    ]


def rules_of(name: str, depth: int) -> dict[int, Rule]:
    """What the stages over layers say, independently."""
    return together(
        *(
            ROWS[stage[0]](depth, stage[1], **(stage[2] if len(stage) > 2 else {}))
            for stage in stages_of(name, depth)
            if stage[0] in ROWS
        )
    )


@contextmanager
def composed(name: str, model: Any) -> Iterator[Any]:
    """A model with the composition on it; calling what is given tells its last decision."""
    method = vtc.compose(*stages_of(name, depth_of(model)))
    with recorded(model) as said, vtc.patch(model, method) as handle:

        def decision() -> tuple[Decision, Any]:
            call, heard = handle._session.last, list(said)
            said.clear()
            later = dict(sorted(call.later.items()))
            return Decision(call.selection, later, handle.report(), heard), handle.plans

        yield decision


def stated(name: str, model: Any, family: str, inputs: Inputs, made: Decision) -> Any:
    """What the language model gets, and which columns of it."""
    if name == MERGING:
        return average_pool(model, family, inputs, fed(model, inputs), 0.5)
    first = COMPOSED[name][0][0]
    given = fed(model, inputs, made.said if first == "flowcut" else None)
    assert made.first is not None
    return given, kept_columns(model, family, inputs, made.first)


@contextmanager
def inside(
    name: str, model: Any, family: str, inputs: Inputs, made: Decision, kept: Tensor
) -> Iterator[Record]:
    """Within it decoder layers do what the stages say."""
    prompt = prompt_of(model, family, inputs, kept)
    with (
        rows_expanded_by_hand(model, family),
        later_masks(model, family, inputs, made.later),
        restated(model, prompt, rules_of(name, depth_of(model))) as record,
    ):
        yield record


def usable(family: str, name: str, batch: int | None = None) -> list[str]:
    """FlowCut refuses what it cannot cut, see the matrix."""
    refused = family == "llava_onevision" and COMPOSED[name][0][0] == "flowcut"
    return [
        prompt
        for prompt, rows in prompts(family).items()
        if prompt in WIDE and batch in (None, len(rows)) and not (refused and prompt != "batch 1")
    ]


@pytest.mark.parametrize("family, name, mode", cells(list(COMPOSED), list(MODES), full=()))
def test_generate_equals_the_statement(family: str, name: str, mode: str) -> None:
    model = model_of(family)
    for prompt in usable(family, name, 1 if mode == "prompt lookup" else None):
        inputs = cached_inputs(family, prompt)
        with composed(name, model) as decision:
            got = run(model, inputs, **MODES[mode])
            made, _ = decision()
        given, kept = stated(name, model, family, inputs, made)
        with inside(name, model, family, inputs, made, kept):
            want = run_fed(model, given.masked(kept), **MODES[SAME_AS.get(mode, mode)])
        assert torch.equal(got, want), prompt


def logits(model: Any, given: Fed) -> Tensor:
    with torch.no_grad(), deepstack(model, given):
        return model(**arguments(given)).logits


@pytest.mark.parametrize("family, name", cells(list(COMPOSED)))
def test_a_forward_equals_the_statement(family: str, name: str) -> None:
    model = model_of(family)
    for prompt in usable(family, name):
        inputs = cached_inputs(family, prompt)
        with torch.no_grad(), composed(name, model) as decision:
            got = model(**inputs).logits
            made, plans = decision()
        given, kept = stated(name, model, family, inputs, made)
        with inside(name, model, family, inputs, made, kept):
            want = logits(model, given.masked(kept))
        seen = kept & inputs["attention_mask"].bool()
        for selection in made.later.values():
            seen &= kept_columns(model, family, inputs, selection)
        torch.testing.assert_close(got[seen], want[seen], atol=2e-5, rtol=1e-4)
        with rows_expanded_by_hand(model, family), later_masks(model, family, inputs, made.later):
            without = logits(model, given.masked(kept))
        # else equality would show nothing
        assert (without[:, -1] - want[:, -1]).abs().max() > 1e-3
        rules = rules_of(name, depth_of(model))
        (plan,) = plans
        for layer, rule in enumerate(plan.rules):
            stage = rules.get(layer, Rule())
            assert (rule.attention, rule.ffn) == (stage.attention, stage.ffn)


@pytest.mark.parametrize("family", FAMILIES)
def test_counts_are_of_the_original_tokens(family: str) -> None:
    model = model_of(family)
    for name in ("two cuts, then frozen", "a cut, then two that skip"):
        for prompt in usable(family, name):
            inputs = cached_inputs(family, prompt)
            with composed(name, model) as decision:
                run(model, inputs, max_new_tokens=1)
                made, _ = decision()
            sizes = [len(places) for places in visual_places(model, family, inputs)]
            last = [stage[1] for stage in COMPOSED[name] if stage[0] not in ROWS][-1]
            assert made.first is not None
            assert made.first.slots.tolist() == [count(last, n) for n in sizes], (name, prompt)


@pytest.mark.parametrize("family", FAMILIES)
def test_sinks_are_those_of_what_is_left(family: str) -> None:
    name = "sinks removed, then frozen"
    model, inputs = model_of(family), cached_inputs(family, MIXED)
    with composed(name, model) as decision:
        run(model, inputs, max_new_tokens=1)
        made, _ = decision()
    given, kept = stated(name, model, family, inputs, made)
    ((cut, left),) = made.later.items()
    seen = []

    def see(module: Any, args: Any, kwargs: Any) -> None:
        seen.append(args[0] if args else kwargs["hidden_states"])

    layer = model.model.language_model.layers[cut + 1]
    hook = layer.register_forward_pre_hook(see, with_kwargs=True)
    try:
        with inside(name, model, family, inputs, made, kept):
            logits(model, given.masked(kept))
    finally:
        hook.remove()
    there = prompt_of(model, family, inputs, kept).visual
    found = is_sink(seen[0], sinks_of(**SINKS)) & there
    gone = (
        there & ~prompt_of(model, family, inputs, kept_columns(model, family, inputs, left)).visual
    )
    assert torch.equal(found, gone) and bool(found.any()) and bool((there & ~gone).any())


@pytest.mark.parametrize("family", ["llava", "qwen3_vl"])
def test_text_that_looks_away_is_seen_where_visual_rows_issue_no_queries(family: str) -> None:
    """ToDRE looks at a layer in which visual rows do not attend: they attend to no text there."""
    model, inputs = model_of(family), cached_inputs(family, "batch 1")
    every = tuple(range(depth_of(model)))
    method = vtc.compose(("todre", 0.5, {"tau": 1.0}), ("naavit", None, {"layers": every}))
    with vtc.patch(model, method) as handle:
        run(model, inputs, max_new_tokens=1)
    assert handle.selections[-1].slots.tolist() == [0]
