"""PAINT's token sets: what an early block looks at and the outliers of a late one."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from vtc.methods.base import Method
from vtc.scorers import ClsAttention, Scorer
from vtc.scorers.cls_attention import AT_TAP
from vtc.selectors import ByRow, Count, Selector, TokenSets


@dataclass(frozen=True, kw_only=True)
class Paint(Method):
    """The token sets of PAINT (Arif et al., arXiv 2501.12206; official code hasanar1f/PAINT) as a
    selection rule. The paper drops nothing: it raises the attention of the last row to these sets
    in the LLM, which is left out here.

    By the attention of [CLS], summed over heads: local tokens are the ⌊N/4⌋ highest in block 0 (144
    of 576), summary tokens those above Q3 + 1.5·IQR in the block that the LLM reads (22 of 24 in
    LLaVA-1.5), quartiles interpolated. Kept are both, in raster order; every crop by itself. How
    many is the method's own affair; at least one of each kind.

    Without [CLS]: the attention that a patch receives, the mean over all queries. As nothing is
    dropped in the paper, positions are kept.

    Args:
        local_share: the share of local tokens, 0.25 in the official code.
        sets: `"both"`, or one of them; local tokens are then those that are not in the summary.
    """

    name: ClassVar[str] = "paint"
    summary: ClassVar[str] = "what block 0 looks at and the outliers of a late block's [CLS] row"
    count: ClassVar[Count] = "adaptive"
    published_positions: ClassVar = "keep"
    bibtex: ClassVar[str] = """@article{arif2025paint,
  title={Fixing Imbalanced Attention to Mitigate In-Context Hallucination of Large Vision-Language
         Model},
  author={Arif, Kazi Hasan Ibn and others},
  journal={arXiv preprint arXiv:2501.12206},
  year={2025}
}"""

    local_share: float = 0.25
    sets: Literal["both", "local", "summary"] = "both"

    def default_scorer(self) -> Scorer:
        """Attention of [CLS]."""
        return ClsAttention(AT_TAP)

    def default_selector(self) -> Selector:
        """The sets of each crop."""
        return ByRow(TokenSets(share=self.local_share, sets=self.sets))
