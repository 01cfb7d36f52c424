"""DivPrune: tokens as far apart as can be."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from vtc.methods.base import Method
from vtc.scorers import Isolation, Scorer
from vtc.selectors import FarthestPoint, Selector


@dataclass(frozen=True, kw_only=True)
class DivPrune(Method):
    """DivPrune (Alvar et al., CVPR 2025, arXiv 2503.02175; official code vbdi/divprune, CC-BY-NC:
    written from its description alone).

    On tokens x `[N, D]` in the LLM's embedding space, D_ij = 1 − cos(x_i, x_j): the first choice is
    argmax_i min_{j ≠ i} D_ij, the token farthest from its nearest; then again and again
    argmax_i min_{c chosen} D_ic, up to T. Over an image's crops, or a video's frames, jointly.

    Code and paper: the official code works in the model's dtype, where distances tie in float16; it
    decides by the first image of a batch and expects 35 tokens before the image. Here it is
    float32, every image by itself, ties to the lowest index. Its ratio is 0.098 of the tokens
    (`keep=0.098`), T = round(ratio·N). The official code renumbers positions.
    """

    name: ClassVar[str] = "divprune"
    summary: ClassVar[str] = "tokens as far from each other as can be, from the most isolated on"
    bibtex: ClassVar[str] = """@inproceedings{alvar2025divprune,
  title={DivPrune: Diversity-based Visual Token Pruning for Large Multimodal Models},
  author={Alvar, Saeed Ranjbar and Singh, Gursimran and Akbari, Mohammad and Zhang, Yong},
  booktitle={IEEE/CVF Conference on Computer Vision and Pattern Recognition},
  year={2025}
}"""

    def default_scorer(self) -> Scorer:
        """The distance to the nearest other token."""
        return Isolation()

    def default_selector(self) -> Selector:
        """The farthest from those chosen."""
        return FarthestPoint()
