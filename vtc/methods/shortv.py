"""ShortV: visual rows are frozen in the decoder layers that contribute least."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from vtc.calibration.data import Calibration
from vtc.methods.base import Exactness, Method, Site
from vtc.methods.layer_choice import plan_by_contribution
from vtc.plans import LayerPlan, LayerRule
from vtc.scorers import LayerContribution, Scorer
from vtc.selectors import Count, Selector, TopK
from vtc.sites import Facts
from vtc.types import Budget, Tokens


@dataclass(frozen=True, kw_only=True)
class ShortV(Method):
    """ShortV (Yuan et al., ICCV 2025, arXiv 2504.00502; official code icip-cas/ShortV).

    In a replaced layer visual rows are frozen: attention and the feed-forward network leave them as
    they are, while text rows see their keys and values as ever. The layers with the lowest
    contribution are replaced first: LC_l = KL(p with layer l frozen ‖ p) of the last prompt token's
    next-token distributions, a mean over a few samples.

    Published are orders for LLaVA-1.5 and LLaVA-NeXT, 7B and 13B, which name 19 of 32 and 24 of 40
    layers; they are never scaled to another language model. The official code is for one image
    behind a prefix of 35 tokens and batches of equal length; here the rows are found in the call.

    `keep` is the share of decoder layers in which visual rows stay active (the paper replaces 60 %:
    `keep=0.4`).

    Args:
        layers: the layers to replace; then leave `keep` out. None: those that the scorer rates
            lowest.
        calibration: where the layers' contributions are from: a `vtc.Calibration`, its file or the
            folder that holds it; None: published for this model, or the file beside its weights.
    """

    name: ClassVar[str] = "shortv"
    summary: ClassVar[str] = "visual rows are frozen in the layers that contribute least"
    site: ClassVar[Site] = "llm_rows"
    exactness: ClassVar[Exactness] = "restatement"
    published_positions: ClassVar[Literal["keep"]] = "keep"
    bibtex: ClassVar[str] = """@inproceedings{yuan2025shortv,
  title={ShortV: Efficient Multimodal Large Language Models by Freezing Visual Tokens in
         Ineffective Layers},
  author={Yuan, Qianhao and others},
  booktitle={Proceedings of the IEEE/CVF International Conference on Computer Vision},
  year={2025}
}"""

    layers: tuple[int, ...] | None = None
    calibration: Calibration | str | None = None

    @property
    def count(self) -> Count:  # type: ignore[override]  # the rest of the package only reads it
        """Exact, unless the layers are given."""
        return "exact" if self.layers is None else "adaptive"

    @property
    def _composed(self) -> bool:
        return self.layers is None

    def default_scorer(self) -> Scorer | None:
        """The contribution of each layer."""
        return LayerContribution()

    def default_selector(self) -> Selector:
        """The layers that contribute most stay active."""
        return TopK()

    def plan(self, layers: Tokens, facts: Facts, budget: Budget) -> LayerPlan:
        """Freeze visual rows in the other layers."""
        rule = LayerRule(attention=False, ffn=False)
        return plan_by_contribution(self, layers, facts, budget, rule)
