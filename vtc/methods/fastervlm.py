"""FasterVLM: the patches that [CLS] attends to in one block."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from vtc.methods.base import Method
from vtc.scorers import ClsAttention, Scorer
from vtc.scorers.cls_attention import AT_TAP
from vtc.selectors import ByRow, Selector, TopK


@dataclass(frozen=True, kw_only=True)
class FasterVlm(Method):
    """FasterVLM (Zhang et al., arXiv 2412.01818v1; official code Theia-4869/FasterVLM).

    Score of patch i: mean_h A[h, CLS, i] in the block whose output the LLM reads (22 of 24 in
    LLaVA-1.5). The T highest of each crop, in raster order. An image's crops share what is kept by
    largest remainder (the official code keeps T of each, 5T in all in LLaVA-NeXT).

    Without [CLS], which the paper does not treat: the attention that a patch receives, the mean
    over all queries. The official code renumbers positions.
    """

    name: ClassVar[str] = "fastervlm"
    summary: ClassVar[str] = "patches that [CLS] attends to in the block the LLM reads"
    bibtex: ClassVar[str] = """@article{zhang2024fastervlm,
  title={[CLS] Attention is All You Need for Training-Free Visual Token Pruning: Make VLM Inference
         Faster},
  author={Zhang, Qizhe and others},
  journal={arXiv preprint arXiv:2412.01818},
  year={2024}
}"""

    def default_scorer(self) -> Scorer:
        """Attention of [CLS]."""
        return ClsAttention(AT_TAP)

    def default_selector(self) -> Selector:
        """The highest of each crop."""
        return ByRow(TopK())
