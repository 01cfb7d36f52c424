"""HiPrune: anchors of a middle block, their neighbors, and what a late block looks at."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from vtc.methods.base import Method
from vtc.scorers import ClsAttention, Scorer
from vtc.selectors import Anchors, ByRow, Selector
from vtc.types import Signal


@dataclass(frozen=True, kw_only=True)
class HiPrune(Method):
    """HiPrune (Liu et al., arXiv 2508.00553).

    Attention received by patch i: the mean over heads and over all queries, [CLS] included.
    Anchors: the round(T·alpha/5) highest in the object block (index 8 of 24); buffers: their
    neighbors left, right, above and below; registers: the highest of all others in the block that
    the LLM reads (22 of 24 in LLaVA-1.5), up to T. In raster order; every crop by itself, T shared
    by largest remainder (official: ⌊T/crops⌋ each). Needs no [CLS].

    Code and paper: the official code finds neighbors by index (±1, ± the width, clamped), so that
    the end of a row neighbors the beginning of the next (`faithful=True`); here they are those of
    the grid. In Qwen2.5-VL it takes index 15 of 32 (OBJECT_LAYER 16): `object_block=11`, scaled.
    The official code renumbers positions in LLaVA and keeps those of Qwen.

    Args:
        alpha: the share of anchors and buffers, 0.1 in the official code.
        object_block: for an encoder of 24 blocks and scaled to others; 8 in the official code
            (OBJECT_LAYER 9, counted from 1).
        faithful: neighbors by index.
    """

    name: ClassVar[str] = "hiprune"
    summary: ClassVar[str] = (
        "anchors of a middle block, their neighbors, and a late block's highest"
    )
    bibtex: ClassVar[str] = """@article{liu2025hiprune,
  title={HiPrune: Training-Free Visual Token Pruning via Hierarchical Attention in Vision-Language
         Models},
  author={Liu, Jizhihui and others},
  journal={arXiv preprint arXiv:2508.00553},
  year={2025}
}"""

    alpha: float = 0.1
    object_block: int = 8
    faithful: bool = False

    def default_scorer(self) -> Scorer:
        """Attention received in the late block."""
        return ClsAttention(Signal("received_row", ends_at_tap=True))

    def default_selector(self) -> Selector:
        """Anchors, buffers and registers of each crop."""
        inner = Signal("received_row", (self.object_block,), depth=24, label="inner_row")
        return ByRow(Anchors(inner, self.alpha, self.faithful))
