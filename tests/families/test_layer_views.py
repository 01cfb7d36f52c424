"""What methods see between decoder layers is what the stock model attends to there."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor

import vtc
from tests.kit.matrix import MIXED, cached_inputs, model_of, run
from tests.kit.models import FAMILIES
from tests.kit.oracle import groups
from tests.kit.turns import parts, two_turns
from vtc.scorers.layer_rows import last_row, next_last_row
from vtc.sites import Facts, LayerView
from vtc.types import Budget

CLOSE = {"atol": 2e-5, "rtol": 1e-4}
LAYER = 2


class Looking(vtc.Method):
    """Keeps everything and remembers the views."""

    name = "looking"
    site = "llm_layer"
    count = "adaptive"

    def __post_init__(self) -> None:
        super().__post_init__()
        object.__setattr__(self, "views", [])

    def llm_layers(self, facts: Facts, budget: Budget | None = None) -> tuple[int, ...]:
        return (LAYER,)

    def layer_cut(self, view: LayerView, budget: Budget) -> Tensor:
        found = [last_row(view), next_last_row(view), view.next_layer(rotary=False)]
        self.views.append((view, *found))  # type: ignore[attr-defined]
        return view.valid


def eager(model: Any, inputs: Any) -> Any:
    stock = copy.deepcopy(model)
    stock.set_attn_implementation("eager")
    with torch.no_grad():
        return stock(**inputs, output_attentions=True, output_hidden_states=True)


@pytest.mark.parametrize("family", FAMILIES)
def test_rows_of_a_layer_and_of_the_one_behind_it(family: str) -> None:
    model, inputs, method = model_of(family), cached_inputs(family, MIXED), Looking()
    with torch.no_grad(), vtc.patch(model, method):
        model(**inputs)
    ((view, row, ahead, unrotated),) = method.views  # type: ignore[attr-defined]
    seen = eager(model, inputs)
    for g, group in enumerate(groups(model, family, inputs)):
        (b,) = group.tokens[:, 0].unique().tolist()
        for layer, got in ((LAYER, row), (LAYER + 1, ahead)):
            want = seen.attentions[layer][b, :, -1].mean(0)[group.tokens[:, 1]]
            torch.testing.assert_close(got[g, : len(want)], want, **CLOSE)
    # turning leaves the length of queries and keys alone
    norms = [x.key.norm(dim=-1) for x in (view.next_layer(), unrotated)]
    torch.testing.assert_close(*norms, **CLOSE)
    assert not torch.allclose(view.next_layer().key, unrotated.key, **CLOSE)
    entrance = view.entrance()
    assert torch.equal(entrance.visual, view.visual) and torch.equal(entrance.mask, view.mask)
    there = view.mask
    embeds = seen.hidden_states[0]
    torch.testing.assert_close(entrance.embeds[there], embeds[there], **CLOSE)


@pytest.mark.parametrize("family", ["llava", "qwen2_5_vl"])
def test_rows_behind_a_cache_of_padded_rows(family: str) -> None:
    """The second of two turns sees what it would in one piece; padding of the first is not."""
    model, method = model_of(family), Looking()
    first, second = parts(family, "a new image")
    with vtc.patch(model, method):
        turns = two_turns(model, family, first, second, run, "whole conversation")
        next(turns)
        whole = method.views[-1][0]  # type: ignore[attr-defined]
        next(turns)
    view, row, ahead, _ = method.views[-1]  # type: ignore[attr-defined]
    assert not whole.mask.all() and view.held is not None
    past = view.key.shape[2] - view.mask.shape[1]
    assert torch.equal(view.held[:, : whole.mask.shape[1]], whole.mask)
    for seen, got in ((view, row), (view.next_layer(), ahead)):
        assert seen.key.shape[2] == view.key.shape[2]
        for g, (_, b) in enumerate(view.parent.tolist()):
            there = seen.reachable[b]
            logits = (seen.query[b, :, -1:] * seen.key[b]).sum(-1) * seen.scale
            want = logits[:, there].softmax(-1).mean(0)
            wide = torch.zeros(len(there)).masked_scatter(there, want)
            at = view.columns[g][view.valid[g]] + past
            torch.testing.assert_close(got[g][view.valid[g]], wide[at], **CLOSE)
