"""HiRED: crops share the budget by what an early block looks at in the thumbnail."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from vtc.methods.base import Method
from vtc.scorers import ClsAttention, Scorer
from vtc.scorers.cls_attention import AT_TAP
from vtc.selectors import CropQuotas, Selector


@dataclass(frozen=True, kw_only=True)
class HiRed(Method):
    """HiRED (Arif et al., AAAI 2025, arXiv 2408.10945; official code hasanar1f/HiRED).

    Patches of the highest attention of [CLS], summed over heads, in the block that the LLM reads
    (22 of 24 in LLaVA-1.5), in raster order. Of an image of several crops the thumbnail gives
    min(⌊alpha·T⌋, its n tokens); the rest of T is shared by the crops in proportion to how many of
    the ⌊(1 − alpha)·n⌋ thumbnail tokens that [CLS] attends to most in block 0 lie where the crop
    is.

    Code and paper: the official code counts them by reshaping the flat map of marks to (rows of
    crops, columns, −1), so that each crop gets those of a run of the raster sequence and not of its
    place (`faithful=True`, which is also what is done where the model does not say how crops lie,
    as in InternVL); it rounds shares down, here largest remainders get what is left, and what is
    above a crop's size goes to the others. It renumbers positions.

    Without [CLS]: the attention that a patch receives, the mean over all queries.

    Args:
        alpha: 0.5 in the official code. Its scripts keep 0.2 of the tokens (`keep=0.2`).
        faithful: marks are counted in runs of the raster sequence.
    """

    name: ClassVar[str] = "hired"
    summary: ClassVar[str] = "crops share by what block 0 looks at, each by the attention of [CLS]"
    bibtex: ClassVar[str] = """@inproceedings{arif2025hired,
  title={HiRED: Attention-Guided Token Dropping for Efficient Inference of High-Resolution
         Vision-Language Models},
  author={Arif, Kazi Hasan Ibn and others},
  booktitle={AAAI Conference on Artificial Intelligence},
  year={2025}
}"""

    alpha: float = 0.5
    faithful: bool = False

    def default_scorer(self) -> Scorer:
        """Attention of [CLS]."""
        return ClsAttention(AT_TAP)

    def default_selector(self) -> Selector:
        """Crop by crop."""
        return CropQuotas(alpha=self.alpha, runs=self.faithful)
