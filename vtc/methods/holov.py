"""HoloV: windows of the picture share the budget by attention and variance."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from vtc.methods.base import Method
from vtc.scorers import ClsAttention, Scorer
from vtc.scorers.cls_attention import AT_TAP
from vtc.selectors import ByRow, Count, Holistic, Selector


@dataclass(frozen=True, kw_only=True)
class HoloV(Method):
    """HoloV (Zou et al., NeurIPS 2025, arXiv 2510.02912).

    Tokens in the LLM's embedding space and attention a of [CLS], mean over heads, in the block that
    the LLM reads (22 of 24 in LLaVA-1.5). Of each of 16 windows: cosines S with a zero diagonal,
    m_i their mean over the n − 1 others, var_i = Σ_j (S_ij − m_i)²/(n − 1), the zero included; the
    window's score is the mean of 1e3·a + 0.09·var·(mean|1e3·a|/mean|var|). Quotas ⌊T·share⌋, the
    rest to the largest shares. Within a window a alone decides. Every crop by itself.

    Code and paper: the official windows are 16 runs of the raster sequence, 1.5 rows each; here
    they are 4×4 squares of the grid. A quota above what a window holds leaves the official code
    with tokens of zeros; here the other windows give them. Both as in the code with
    `faithful=True`, except that the tokens of zeros are left out and that tokens always stand in
    raster order here (official: by attention, run by run). T = 64 is a literal in the repository.
    It renumbers positions. Without [CLS]: the attention that a patch receives, the mean over all
    queries.

    Args:
        faithful: runs of the raster sequence, and what does not fit into one is lost.
    """

    name: ClassVar[str] = "holov"
    summary: ClassVar[str] = "windows share by attention of [CLS] and variance, choose by the first"
    bibtex: ClassVar[str] = """@inproceedings{zou2025holov,
  title={Don't Just Chase "Highlighted Tokens" in MLLMs: Revisiting Visual Holistic Context
         Retention},
  author={Zou, Xin and others},
  booktitle={Advances in Neural Information Processing Systems},
  year={2025}
}"""

    faithful: bool = False

    @property
    def count(self) -> Count:  # type: ignore[override]  # the rest of the package only reads it
        """Exact, but for what official code pads with zeros."""
        return "at_most" if self.faithful else "exact"

    def default_scorer(self) -> Scorer:
        """Attention of [CLS]."""
        return ClsAttention(AT_TAP)

    def default_selector(self) -> Selector:
        """Windows of each crop."""
        return ByRow(Holistic(self.faithful))
