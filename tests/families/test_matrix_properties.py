"""What holds for every family × method: nothing dropped is stock, rows do not know each other, and
what is kept is what was asked for."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from tests.kit.matrix import (
    SPECS,
    Decision,
    Spec,
    cached_inputs,
    cells,
    decided,
    others,
    patched,
    run,
    some,
    stock,
)
from tests.kit.models import FAMILIES
from tests.kit.oracle import visual_places
from tests.kit.plain import count
from tests.kit.plain_slots import has_slots
from tests.kit.prompts import Inputs, alone

pytestmark = pytest.mark.filterwarnings("ignore:.*(do_sample|max_length).*")

COUNTED = [spec for spec in SPECS if spec.keep is not None]
# in all layers its visual tokens still see their neighbors alone
NEVER_STOCK = ("yopo",)
LOGITS = {"return_dict_in_generate": True, "output_logits": True}


@pytest.mark.parametrize(
    "family, spec", cells([s for s in COUNTED if s.name not in NEVER_STOCK]), ids=str
)
def test_keeping_everything_is_bit_identical(family: str, spec: Spec) -> None:
    model = spec.model(family)
    # of layers a number is not taken
    everything = (1.0,) if spec.over_layers else (1.0, 10_000)
    prompt = some(family, spec)[-1]
    inputs = cached_inputs(family, prompt)
    want, direct = stock(family, spec.layers, prompt)
    for keep in everything:
        with torch.no_grad(), patched(spec, family, keep) as decision:
            got, forward = run(model, inputs, **LOGITS), model(**inputs)
            first = decision().first
        assert first is not None and first.is_identity
        assert torch.equal(got.sequences, want.sequences)
        assert all(torch.equal(a, b) for a, b in zip(got.logits, want.logits, strict=True))
        assert torch.equal(forward.logits, direct.logits)


def rows_of(selection: Any) -> list[list[int]]:
    """What each image keeps, and where what is merged stands."""
    return [[i for i in row if i >= 0] for row in selection.slot_positions.tolist()]


def kept_of(selection: Any) -> list[list[int]]:
    """What each image keeps as it is or with others merged in, but for [CLS]."""
    pairs = zip(selection.keep, selection.valid, strict=True)
    return [[i for i in keep[valid].tolist() if i >= 0] for keep, valid in pairs]


def anew(family: str, spec: Spec, inputs: Inputs, **options: Any) -> tuple[Tensor, Decision]:
    with patched(spec, family, **options) as decision:
        return run(spec.model(family), inputs), decision()


def compare_rows(family: str, spec: Spec, prompts: list[str]) -> None:
    for prompt in [p for p in prompts if p != "batch 1"]:
        inputs = cached_inputs(family, prompt)
        whole, made = decided(family, spec, prompt)
        assert made.first is not None
        owner = made.first.parent[:, 1].tolist()
        for row, want in enumerate(whole):
            got, single = anew(family, spec, alone(family, inputs, row))
            assert torch.equal(got[0], want), (prompt, row)
            mine = [g for g, b in enumerate(owner) if b == row]
            if not mine:
                assert single.first is None
                continue
            pairs = [(made.first, single.first)]
            pairs += [(made.later[at], single.later[at]) for at in made.later]
            for together, by_itself in pairs:
                assert [rows_of(together)[g] for g in mine] == rows_of(by_itself)


@pytest.mark.parametrize("family, spec", cells(SPECS), ids=str)
def test_a_row_of_a_batch_equals_the_row_alone(family: str, spec: Spec) -> None:
    compare_rows(family, spec, some(family, spec))


def compare_seeds(family: str, spec: Spec, prompts: list[str]) -> None:
    kind = spec.method(family)
    for prompt in prompts:
        inputs = cached_inputs(family, prompt)
        answer, made = decided(family, spec, prompt)
        torch.manual_seed(99)
        again, same = anew(family, spec, inputs)
        assert torch.equal(answer, again)
        assert made.first is not None and same.first is not None
        assert rows_of(made.first) == rows_of(same.first)
        sizes = [len(tokens) for tokens in visual_places(spec.model(family), family, inputs)]
        for selection in (made.first, *made.later.values()):
            assert list(selection.lengths) == sizes
            for kept, first, n in zip(rows_of(selection), kept_of(selection), sizes, strict=True):
                # what is appended stands behind what is kept, in an order of its own
                ascending = first if first and has_slots(selection) else kept
                assert ascending == sorted(set(ascending)) and all(0 <= i < n for i in kept)
        found = list(made.report.kept_tokens)
        if spec.over_layers and kind.count == "exact":
            assert found == sizes, prompt
        elif kind.count == "exact" and spec.keep is not None:
            assert found == [count(spec.keep, n) for n in sizes], prompt
        elif kind.count == "at_most":
            assert spec.keep is not None
            assert all(0 < k <= count(spec.keep, n) for k, n in zip(found, sizes, strict=True))
        assert list(made.report.visual_tokens) == sizes
        before = made.first
        for after in made.later.values():
            pairs = zip(rows_of(before), rows_of(after), strict=True)
            assert all(set(left) <= set(there) for there, left in pairs)
            before = after


@pytest.mark.parametrize("family, spec", cells(SPECS), ids=str)
def test_same_seed_same_result_and_counts_as_asked(family: str, spec: Spec) -> None:
    compare_seeds(family, spec, some(family, spec))


@pytest.mark.slow
@pytest.mark.parametrize("spec", SPECS, ids=str)
@pytest.mark.parametrize("family", FAMILIES)
def test_rows_and_seeds_on_other_prompts(family: str, spec: Spec) -> None:
    compare_rows(family, spec, others(family, spec))
    compare_seeds(family, spec, others(family, spec))


@pytest.mark.parametrize("family", FAMILIES)
def test_another_seed_draws_other_tokens(family: str) -> None:
    (spec,) = (spec for spec in SPECS if spec.name == "random")
    inputs = cached_inputs(family, "batch 1")
    drawn = [rows_of(anew(family, spec, inputs, seed=seed)[1].first) for seed in (0, 1)]
    assert drawn[0] != drawn[1]
