"""VisPruner: patches that matter, and of the others those that are no copies."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from vtc.methods.base import Method
from vtc.scorers import ClsAttention, Scorer
from vtc.scorers.cls_attention import AT_TAP
from vtc.selectors import ByRow, Distinct, Selector
from vtc.types import Signal


@dataclass(frozen=True, kw_only=True)
class VisPruner(Method):
    """VisPruner (Zhang et al., ICCV 2025, arXiv 2412.01818v2; official code
    Theia-4869/VisPruner).

    ⌊T/2⌋ patches of the highest attention of [CLS], mean over heads, in the block that the LLM
    reads (22 of 24 in LLaVA-1.5). Of the rest, most attended first, T − ⌊T/2⌋ are left by rounds:
    the list is split into even and odd items, the 8 even ones most like an odd one (cosine of
    encoder features before the projector) go, and the next list is the even ones left, most alike
    first, then the odd ones. That order decides who is even next and is the official code's. The
    union in raster order. Every crop by itself, T shared by largest remainder.

    Without [CLS]: the attention that a patch receives, the mean over all queries. The official code
    renumbers positions.

    Args:
        important_ratio: the share kept by attention, 0.5 in the official code.
    """

    name: ClassVar[str] = "vispruner"
    summary: ClassVar[str] = "half by the attention of [CLS], half what is left when copies go"
    bibtex: ClassVar[str] = """@inproceedings{zhang2025vispruner,
  title={Beyond Text-Visual Attention: Exploiting Visual Cues for Effective Token Pruning in VLMs},
  author={Zhang, Qizhe and others},
  booktitle={IEEE/CVF International Conference on Computer Vision},
  year={2025}
}"""

    important_ratio: float = 0.5

    def default_scorer(self) -> Scorer:
        """Attention of [CLS]."""
        return ClsAttention(AT_TAP)

    def default_selector(self) -> Selector:
        """What matters and what is distinct in each crop."""
        features = Signal("encoder_features", ends_at_tap=True)
        return ByRow(Distinct(share=self.important_ratio, of=features))
