"""SCOPE: tokens that cover what is not covered yet, weighted by what [CLS] attends to."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from vtc.methods.base import Method
from vtc.scorers import ClsAttention, Scorer
from vtc.scorers.cls_attention import AT_TAP
from vtc.selectors import ByRow, Coverage, Selector
from vtc.types import Signal


@dataclass(frozen=True, kw_only=True)
class Scope(Method):
    """SCOPE (Deng et al., NeurIPS 2025, arXiv 2510.24214; official code without a license file:
    written from its description alone).

    On features v `[N, D]` of the encoder before the projector, S = cosines, w = (attention of
    [CLS])^alpha in the block that the LLM reads (22 of 24 in LLaVA-1.5), m = 0: T times the token
    of the highest gain w_i · Σ_j max(0, S_ji − m_j), and m_j becomes max(m_j, S_jc). Every crop by
    itself, T shared by largest remainder (official: ⌊T/crops⌋ each); in raster order.

    Where several patches become one LLM token, v is their mean. Without [CLS]: the attention that
    a patch receives, the mean over all queries. Official scores are in the model's dtype; here they
    are float32. The official code renumbers positions.

    Args:
        alpha: 1 in the official code (environment variable ALPHA).
    """

    name: ClassVar[str] = "scope"
    summary: ClassVar[str] = "tokens that cover the others, weighted by the attention of [CLS]"
    bibtex: ClassVar[str] = """@inproceedings{deng2025scope,
  title={SCOPE: Saliency-Coverage Oriented Token Pruning for Efficient Multimodel LLMs},
  author={Deng, Jinhong and others},
  booktitle={Advances in Neural Information Processing Systems},
  year={2025}
}"""

    alpha: float = 1.0

    def default_scorer(self) -> Scorer:
        """Attention of [CLS]."""
        return ClsAttention(AT_TAP)

    def default_selector(self) -> Selector:
        """Greedy coverage of each crop."""
        return ByRow(Coverage(alpha=self.alpha, of=Signal("encoder_features", ends_at_tap=True)))
