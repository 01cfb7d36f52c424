"""Where the time of a method's decisions is counted, wherever they are made."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any, ClassVar

import pytest
import torch

import vtc
from tests.kit.matrix import cached_inputs, model_of
from vtc.methods.base import Exactness, Method, Site
from vtc.sites import BlockView, Cut, Facts, LayerView
from vtc.types import Budget, Selection, Tokens

WAIT_MS = 120


def wait() -> None:
    time.sleep(WAIT_MS / 1e3)


@dataclass(frozen=True, kw_only=True)
class SlowBefore(Method):
    """Waits before the LLM."""

    def select(self, tokens: Tokens, budget: Budget) -> Selection:
        wait()
        return vtc.method("uniform").select(tokens, budget)


@dataclass(frozen=True, kw_only=True)
class SlowInside(Method):
    """Waits twice between decoder layers."""

    site: ClassVar[Site] = "llm_layer"

    def llm_layers(self, facts: Facts, budget: Budget | None = None) -> tuple[int, ...]:
        return (0, 1)

    def layer_cut(self, view: LayerView, budget: Budget) -> torch.Tensor:
        wait()
        return view.valid & (torch.arange(view.valid.shape[1]) % (view.layer + 2) == 0)


@dataclass(frozen=True, kw_only=True)
class SlowEncoder(Method):
    """Waits inside the encoder, where it drops every second patch."""

    site: ClassVar[Site] = "encoder"
    exactness: ClassVar[Exactness] = "restatement"

    def encoder_blocks(self, facts: Facts) -> tuple[int, ...]:
        return (0,)

    def encoder_cut(self, view: BlockView, budget: Budget) -> Cut:
        wait()
        return Cut(view.valid & (torch.arange(view.valid.shape[1]) % 2 == 0), {})


@pytest.mark.parametrize(
    ("method", "waits"),
    [(SlowEncoder(), 1), (SlowBefore(), 1), (SlowInside(), 2)],
    ids=["encoder", "before", "inside"],
)
@pytest.mark.parametrize("fast", [False, "eager"])
def test_decisions_are_the_selectors_time(method: Method, waits: int, fast: Any) -> None:
    # captured, a cut inside the encoder is part of it
    fast = False if isinstance(method, SlowEncoder) else fast
    model, inputs = model_of("llava"), cached_inputs("llava", "batch 1")
    with vtc.patch(model, method, 0.5, fast=fast) as handle:
        for _ in range(2):  # the first call of a process is slow everywhere
            model.generate(**inputs, max_new_tokens=1, do_sample=False)
    report = handle.report()
    assert report.encoder_ms is not None and report.selector_ms is not None
    assert report.ttft_ms is not None
    assert waits * WAIT_MS <= report.selector_ms < report.ttft_ms
    assert report.encoder_ms < WAIT_MS
    assert report.encoder_ms + report.selector_ms <= report.ttft_ms
