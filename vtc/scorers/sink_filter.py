"""Attention sinks of the LLM kept out of what another scorer chooses from."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from vtc import ops
from vtc.calibration.data import Calibration
from vtc.errors import SignalError
from vtc.scorers.base import Scorer
from vtc.scorers.sinks import PUBLISHED_DEPTH, sink_dims
from vtc.sites import Facts
from vtc.types import Signal, Tokens

_FIRST = torch.finfo(torch.float32).min


@dataclass(frozen=True)
class SinkFilter(Scorer):
    """Another scorer's scores, with tokens that are sinks in the LLM (as `var` finds them) behind
    all others: they are kept last, the weakest first.

    Before the LLM nothing is known of its sinks: its first `layer` layers run once more, on the
    whole prompt. That costs `layer` over L of a stock prefill and is counted as selector time.

    Args:
        scorer: whose scores; None: the method's own.
        layer: the decoder layer whose input is looked at, of 32 and scaled to others; 2 is the
            first at whose input sinks show.
        tau: above which massive activation a token is a sink, 20 in VAR.
        dims: the sink dimensions; None: calibrated, or published for known language models.
        calibration: where they are from, as in `var`.
    """

    name: ClassVar[str] = "sink_filter"

    scorer: Scorer | None = None
    layer: int = 2
    tau: float = 20.0
    dims: tuple[int, ...] | None = None
    calibration: Calibration | str | None = None

    @property
    def needs(self) -> tuple[Signal, ...]:
        """What the other scorer reads, and the input of a decoder layer."""
        inner = () if self.scorer is None else self.scorer.needs
        hidden = Signal("llm_hidden", (self.layer,), depth=PUBLISHED_DEPTH)
        return (*inner, hidden) if self.dims != () else inner

    def around(self, own: Scorer | None) -> Scorer:
        """With the method's own scorer inside, where none was given."""
        if self.scorer is not None:
            return self
        if own is None:
            raise SignalError(
                "scorer 'sink_filter' stands in front of a method's scorer and this method has "
                "none, expected one: pass SinkFilter(scorer)"
            )
        return replace(self, scorer=own)

    def on(self, facts: Facts) -> Scorer:
        """With the language model's sink dimensions."""
        dims = self.dims
        if dims is None or dims:
            dims = sink_dims(dims, self.calibration, facts, self.name)
        return replace(self, dims=dims, scorer=self.scorer and self.scorer.on(facts))

    def __call__(self, tokens: Tokens) -> Tensor:
        """Scores `float32[G, N]`."""
        if self.scorer is None:
            raise SignalError(
                "scorer 'sink_filter' has no scorer to filter: pass SinkFilter(scorer)"
            )
        scores = self.scorer(tokens)
        if not self.dims:
            return scores
        norms = ops.massive_activation(tokens.signal("llm_hidden"), self.dims).to(scores.device)
        # any score of a sink lies below any of another token, the strongest sink's lowest
        return torch.where(norms > self.tau, _FIRST / 2 * (1 + norms / (1 + norms)), scores)
