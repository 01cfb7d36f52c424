"""LLaVA-PruMerge and PruMerge+: outliers of the [CLS] row, into which others are merged."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from vtc.mergers import Neighbors
from vtc.methods.base import Exactness, Method
from vtc.scorers import ClsAttention, Scorer
from vtc.selectors import ByRow, Count, Selector
from vtc.types import Signal


@dataclass(frozen=True, kw_only=True)
class PruMerge(Method):
    """LLaVA-PruMerge (Shang et al., ICCV 2025, arXiv 2403.15388; code 42Shawn/LLaVA-PruMerge).

    a `[N]`: the [CLS] row of softmax(q·kᵀ/√width) in the last block (23 of 24), all heads as one.
    Kept are as many of the highest a as lie above Q3 + 1.5·IQR, at least one. Each becomes itself
    plus Σ a·x over the 32 others whose keys are most like its own by cosine, not normalized; one
    token more, behind, is Σ a·x over all that are dropped. x are features before the projector, or
    tokens behind it where it joins several patches (Qwen-VL, InternVL) or they are pooled there
    (LLaVA-OneVision). Every crop by itself; how many are kept is the method's affair, see
    `report()`. The official code sends them by falling a, here they stand in raster order; it
    renumbers positions.

    Without [CLS], which the paper does not treat: the attention that a patch receives, the mean
    over heads and queries.

    Args:
        nearest: others that a kept token takes in, 32 in the official code.
    """

    name: ClassVar[str] = "prumerge"
    summary: ClassVar[str] = "outliers of the [CLS] row, with what is like them merged in"
    count: ClassVar[Count] = "adaptive"
    exactness: ClassVar[Exactness] = "restatement"
    bibtex: ClassVar[str] = """@inproceedings{shang2025prumerge,
  title={LLaVA-PruMerge: Adaptive Token Reduction for Efficient Large Multimodal Models},
  author={Shang, Yuzhang and Cai, Mu and Xu, Bingxin and Lee, Yong Jae and Yan, Yan},
  booktitle={IEEE/CVF International Conference on Computer Vision},
  year={2025}
}"""
    stride: ClassVar[bool] = False

    nearest: int = 32

    def default_scorer(self) -> Scorer:
        """Attention of [CLS] in the last block."""
        return ClsAttention(Signal("cls_row_joint", (-1,), stand_in="received_row"))

    def default_selector(self) -> Selector:
        """Outliers and their neighbors of each crop."""
        return ByRow(Neighbors(self.nearest, self.stride))


@dataclass(frozen=True, kw_only=True)
class PruMergePlus(PruMerge):
    """PruMerge+: `prumerge`, and besides its k outliers of N tokens those at 0, s, 2s, ... before
    the last one, s = ⌊⌊N/k⌋/3⌋, at least 1 (the official code fails there)."""

    name: ClassVar[str] = "prumerge_plus"
    summary: ClassVar[str] = "prumerge with equally spaced tokens besides the outliers"
    stride: ClassVar[bool] = True
