"""Visual attention sinks are removed, or not read."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar, Literal

import torch
from torch import Tensor

from vtc.calibration.data import Calibration
from vtc.errors import VtcError
from vtc.methods.base import Exactness, Method, Site
from vtc.plans import LayerRule
from vtc.scorers import Scorer, SinkNorm
from vtc.scorers.sinks import PUBLISHED_DEPTH, first_layer, massive, sink_dims
from vtc.selectors import Count, Selector, TopK
from vtc.sites import Facts, LayerView, RowView
from vtc.types import Budget, Selection, Signal, Tokens, scale_layer


@dataclass(frozen=True, kw_only=True)
class SinkRemoval(Method):
    """Visual sinks as VAR finds them (Kang et al., ICLR 2025, arXiv 2503.03321; detector of the
    official code seilk/VisAttnSink), removed. The paper masks them to show that they are not
    needed, and as many random visual tokens to show that those are; it has no compression.

    A visual token is a sink where its massive activation φ is above `tau` (see `var`).
    `mode="remove"`: sinks at the input of layer l are gone from layer l on. `mode="mask"`: in every
    layer from 2 of 32 on, text rows do not read the visual sinks of that layer's input; all tokens
    stay. How many go is the sinks' number; which of an image's go is the scorer's choice, so that
    `scorer="random"` is the paper's control.

    As a filter in front of another method's scorer: `vtc.scorers.SinkFilter`.

    Args:
        mode: removal from a layer on, or masking in each layer.
        layer: l, of 32 layers and scaled to others; 2 is the first at whose input sinks show.
        tau: τ, 20 in VAR.
        dims: the sink dimensions; None: calibrated, or published for known language models.
        calibration: where they are from: a `vtc.Calibration`, its file or the folder that holds it;
            None: published for this model, or the file beside its weights.
    """

    name: ClassVar[str] = "sink_removal"
    summary: ClassVar[str] = "visual attention sinks leave the LLM, or are not read"
    count: ClassVar[Count] = "adaptive"
    published_positions: ClassVar[Literal["keep"]] = "keep"
    bibtex: ClassVar[str] = """@inproceedings{kang2025see,
  title={See What You Are Told: Visual Attention Sink in Large Multimodal Models},
  author={Kang, Seil and others},
  booktitle={International Conference on Learning Representations},
  year={2025}
}"""

    mode: Literal["remove", "mask"] = "remove"
    layer: int = 2
    tau: float = 20.0
    dims: tuple[int, ...] | None = None
    calibration: Calibration | str | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        self.expect(self.layer >= 1, "at least 1: no layer is before layer 0", "layer")

    @property
    def site(self) -> Site:  # type: ignore[override]  # the rest of the package only reads it
        """Where it acts: between layers, or in them."""
        return "llm_layer" if self.mode == "remove" else "llm_rows"

    @property
    def exactness(self) -> Exactness:  # type: ignore[override]
        """What the patched model equals."""
        return "layer_mask" if self.mode == "remove" else "restatement"

    @property
    def _composed(self) -> bool:
        return True

    def default_scorer(self) -> Scorer:
        """The strongest sinks go."""
        return SinkNorm()

    def default_selector(self) -> Selector:
        """The highest scores stay: as many as there are tokens that are no sinks."""
        return TopK()

    @property
    def needs(self) -> tuple[Signal, ...]:
        """A number made from the pixels, for scorers that draw."""
        return tuple(signal for signal in super().needs if signal.name == "image_key")

    def on(self, facts: Facts) -> SinkRemoval:
        """With the language model's sink dimensions."""
        if self.dims is not None and not self.dims:
            return self
        dims = sink_dims(self.dims, self.calibration, facts, self.name)
        return replace(self, dims=dims)

    def llm_layers(self, facts: Facts, budget: Budget | None = None) -> tuple[int, ...]:
        """Layer index l − 1, or the first that can be cut after."""
        if self.mode == "mask" or not self.dims:
            return ()
        first = max(1, scale_layer(self.layer, PUBLISHED_DEPTH, facts.llm_depth))
        return (max(first - 1, facts.first_layer_cut),)

    def layer_cut(self, view: LayerView, budget: Budget) -> Tensor:
        """All but as many as are sinks, `bool[G, N]`."""
        if view.hidden is None:
            raise VtcError(f"method {self.name!r} got a view without hidden states")
        return self._kept(view, view.hidden)

    def rule_layers(self, facts: Facts) -> tuple[int, ...]:
        """Those in which sinks may show, if any can."""
        if self.mode == "remove" or not self.dims:
            return ()
        return tuple(range(first_layer(facts.llm_depth), facts.llm_depth))

    def layer_rule(self, view: RowView, rule: LayerRule) -> LayerRule:
        """Text does not read as many visual tokens as are sinks."""
        gone = view.valid & ~self._kept(view, view.hidden)
        unread = torch.zeros_like(view.visual)
        rows = view.parent[:, 1:].expand_as(view.columns)
        unread[rows[gone], view.columns[gone]] = True
        return replace(rule, unread=unread)

    def _kept(self, view: LayerView | RowView, hidden: Tensor) -> Tensor:
        rows = view.parent[:, 1:]
        norms = massive(hidden, self.dims or ())[rows, view.columns]  # [G, N]
        sinks = (norms > self.tau) & view.valid
        counts = (view.valid & ~sinks).sum(-1).cpu()
        signals = {"sink_norm": norms}
        if view.image_key is not None:
            signals["image_key"] = view.image_key
        tokens = Tokens(
            features=hidden[rows, view.columns],
            valid=view.valid,
            grid=tuple((1, 1, n) for n in view.valid.sum(-1).tolist()),
            parent=view.parent.cpu(),
            signals=signals,
            seed=view.seed,
        )
        scorer = self.active_scorer
        scores = scorer(tokens) if scorer and self.active_selector.uses_scores else None
        chosen: Selection = self.active_selector(tokens, scores, counts)
        mask = chosen.mask()
        return _wide(mask, view.valid.shape[1]) & view.valid


def _wide(mask: Tensor, width: int) -> Tensor:
    return torch.nn.functional.pad(mask, (0, width - mask.shape[1]))
