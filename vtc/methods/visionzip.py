"""VisionZip: the patches that [CLS] attends to, and a few tokens made of all others."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from vtc.mergers import Contextual
from vtc.methods.base import Exactness, Method
from vtc.scorers import ClsAttention, Scorer
from vtc.scorers.cls_attention import AT_TAP
from vtc.selectors import ByRow, Selector


@dataclass(frozen=True, kw_only=True)
class VisionZip(Method):
    """VisionZip (Yang et al., CVPR 2025, arXiv 2412.04467; official code dvlab-research/VisionZip).

    Dominant: [CLS] itself and the patches of its highest attention, summed over heads, in the block
    that the LLM reads (22 of 24 in LLaVA-1.5), in raster order. Contextual: of the n patches left
    those at ranks 0, s, 2s, ..., s = max(1, ⌊n/c⌋), are c targets; each other one belongs to the
    target of highest cosine of head-averaged keys of that block. A contextual token is its target
    plus the mean of those that belong to it, on features before the projector, and stands behind
    the dominant ones. Every crop by itself, T shared by largest remainder.

    [CLS] counts toward `keep`, has index −1 and stands in front of its image. It is sent where the
    projector takes it and an image is one crop (LLaVA-1.5 with CLIP); else a patch takes its place.
    Where the projector joins several patches (Qwen-VL, InternVL), or tokens are pooled behind it
    (LLaVA-OneVision), sums are of tokens behind it, as in the official code for Qwen2.5-VL; keys
    are the mean over a token's patches, with rotary positions. Without [CLS]: the attention that a
    patch receives, the mean over all queries, as there.

    Published: 64 = 54 + 10, 128 = 108 + 20, 192 = 162 + 30 tokens. The official code drops newline
    tokens in LLaVA-NeXT, here those of rows of kept tokens stay; it renumbers positions.

    Args:
        contextual: the share of contextual tokens, 10/64 in the README.
        cls: whether [CLS] is sent; None: where it can be.
    """

    name: ClassVar[str] = "visionzip"
    summary: ClassVar[str] = "patches that [CLS] attends to, and a few tokens made of the others"
    exactness: ClassVar[Exactness] = "restatement"
    bibtex: ClassVar[str] = """@inproceedings{yang2025visionzip,
  title={VisionZip: Longer is Better but Not Necessary in Vision Language Models},
  author={Yang, Senqiao and others},
  booktitle={IEEE/CVF Conference on Computer Vision and Pattern Recognition},
  year={2025}
}"""

    contextual: float = 10 / 64
    cls: bool | None = None

    def default_scorer(self) -> Scorer:
        """Attention of [CLS]."""
        return ClsAttention(AT_TAP)

    def default_selector(self) -> Selector:
        """Dominant and contextual tokens of each crop."""
        return ByRow(Contextual(self.contextual, self.cls))
