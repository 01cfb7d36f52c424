"""Kept indices worked out by hand: see tests/goldens/ for the derivations."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import vtc
from tests.methods.views import run_encoder, stated_layer, stated_view
from vtc.sites import LayerCut
from vtc.types import Budget, Tokens

CASES = [
    pytest.param(case, id=f"{path.stem}: {case['case']}")
    for path in sorted((Path(__file__).parents[1] / "goldens").glob("*.json"))
    for case in json.loads(path.read_text())
]


@pytest.mark.parametrize("case", [c for c in CASES if "blocks" in c.values[0]])
def test_golden_in_the_encoder(case: dict[str, Any]) -> None:
    view = stated_view(case["blocks"], case.get("cls", True), case.get("m", 1))
    method = vtc.method(case["method"], **case.get("options", {}))
    got = run_encoder(method, case["keep"], view, len(case["blocks"]))
    assert [row for (row,) in got] == case["kept"]


@pytest.mark.parametrize("case", [c for c in CASES if "pixels" in c.values[0]])
def test_golden_before_the_encoder(case: dict[str, Any]) -> None:
    grid = torch.tensor(case["pixels"], dtype=torch.float32)
    view = stated_view([{"a": [1.0] * grid.numel()}], cls=True, m=1)(0, None, None)
    cells = torch.cartesian_prod(*(torch.arange(n) for n in (1, *grid.shape)))
    view = replace(view, block=-1, pixels=grid.view(1, -1, 1), cells=cells[None])
    cut = vtc.method(case["method"], **case.get("options", {})).encoder_cut(view, Budget(None))
    assert cut.keep is not None
    assert cut.keep[0].nonzero()[:, 0].tolist() == case["kept"]


@pytest.mark.parametrize("case", [c for c in CASES if "entries" in c.values[0]])
def test_golden_between_decoder_layers(case: dict[str, Any]) -> None:
    view = stated_layer(case)
    method = vtc.method(case["method"], **case.get("options", {}))
    cut = method.layer_cut(view, Budget.of(case["keep"]))
    cut = cut if isinstance(cut, LayerCut) else LayerCut.alone(cut)
    assert cut.keep[0].nonzero()[:, 0].tolist() == case["kept"]
    if "clusters" in case:
        members = [(cut.into[0] == k) & (cut.weight[0] != 0) for k in case["kept"]]
        assert [m.nonzero()[:, 0].tolist() for m in members] == case["clusters"]


@pytest.mark.parametrize(
    "case", [c for c in CASES if not {"blocks", "entries", "pixels"} & set(c.values[0])]
)
def test_golden(case: dict[str, Any]) -> None:
    t, h, w = case["grid"]
    n = t * h * w
    signals = {name: torch.tensor(value)[None] for name, value in case.get("signals", {}).items()}
    tokens = Tokens(
        features=torch.tensor(case.get("features", [[0.0]] * n))[None],
        valid=torch.ones(1, n, dtype=torch.bool),
        grid=((t, h, w),),
        parent=torch.zeros(1, 2, dtype=torch.int64),
        signals=signals,
        text=torch.tensor([case["text"]]) if "text" in case else None,
        text_valid=torch.ones(1, len(case.get("text", ())), dtype=torch.bool),
        parts=(tuple(map(tuple, case["parts"])),) if "parts" in case else None,
        overview=(tuple(case["overview"]),) if "overview" in case else None,
    )
    selection = vtc.method(case["method"], **case.get("options", {})).select(
        tokens, Budget.of(case["keep"])
    )
    assert selection.keep[0, selection.valid[0]].tolist() == case["kept"]
    if "positions" in case:
        assert selection.slot_positions[0].tolist() == case["positions"]
    if "tokens" in case:
        torch.testing.assert_close(
            selection.apply(tokens.features)[0], torch.tensor(case["tokens"])
        )


def test_every_method_that_chooses_by_rule_has_goldens() -> None:
    # what methods over decoder layers say is pinned in tests/families/test_rows_plans.py
    apart = {name for name in vtc.methods() if vtc.method(name).site == "llm_rows"}
    choosing = [name for name in vtc.methods() if name not in apart | {"sink_removal"}]
    counted = {name: sum(c.values[0]["method"] == name for c in CASES) for name in choosing}
    chance = {"random", "none"}  # their properties are in test_universal.py
    assert all(count >= 3 for name, count in counted.items() if name not in chance), counted
