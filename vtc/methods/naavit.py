"""NAAViT: in chosen decoder layers visual rows issue no queries."""

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
class NaaVit(Method):
    """NAAViT, the operator of SAISA (Yuan et al., arXiv 2502.02458; official code
    icip-cas/SAISA), without training.

    In a chosen layer visual rows issue no queries: no query and no output is projected for them and
    attention leaves them as they are. Their keys and values are computed and cached as ever, at
    their own positions; text rows see what they see in stock, causally. The feed-forward network
    runs on all rows, or with `skip_ffn` on text rows alone (then a visual row is frozen, as in
    ShortV). Later steps are stock and the cache is as long as ever.

    SAISA trains with the operator in every layer and overwrites visual rows by projected encoder
    features; neither is done here, and which layers a stock model can do without is not in the
    paper: by default those with the lowest contribution by ShortV's measure. The official code adds
    LN(x) to visual rows behind a layer, which its overwriting makes harmless; here they are left.

    `keep` is the share of decoder layers in which visual rows stay active.

    Args:
        layers: the layers in which visual rows skip attention; then leave `keep` out. None: those
            that the scorer rates lowest.
        skip_ffn: whether they skip the feed-forward network there as well.
        calibration: where the layers' contributions are from: a `vtc.Calibration`, its file or the
            folder that holds it; None: published for this model, or the file beside its weights.
    """

    name: ClassVar[str] = "naavit"
    summary: ClassVar[str] = "visual rows issue no queries in the layers that contribute least"
    site: ClassVar[Site] = "llm_rows"
    exactness: ClassVar[Exactness] = "restatement"
    published_positions: ClassVar[Literal["keep"]] = "keep"
    bibtex: ClassVar[str] = """@article{yuan2025saisa,
  title={SAISA: Towards Multimodal Large Language Models with Both Training and Inference
         Efficiency},
  author={Yuan, Qianhao and others},
  journal={arXiv preprint arXiv:2502.02458},
  year={2025}
}"""

    layers: tuple[int, ...] | None = None
    skip_ffn: bool = False
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
        """Skip attention, and if asked for the feed-forward network, in the other layers."""
        rule = LayerRule(attention=False, ffn=not self.skip_ffn)
        return plan_by_contribution(self, layers, facts, budget, rule)
