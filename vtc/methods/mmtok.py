"""MMTok: tokens that cover the question and the picture."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from vtc.methods.base import Method
from vtc.selectors import Selector, TextCoverage


@dataclass(frozen=True, kw_only=True)
class MmTok(Method):
    """MMTok (Dong et al., ICLR 2026, arXiv 2508.18264).

    Greedy maximum coverage Σ_rows max_{c chosen} of rows softmax(z·x̂ᵀ/τ_tv)/m for each of m text
    tokens z and alpha·softmax(v̂·v̂ᵀ/τ_vv)/n for each of n tokens, in float32: x̂ `[n, D]` the
    normalized tokens in the LLM's embedding space, z `[m, D]` the LLM's embeddings of the text
    behind the row's last image, as they are; v̂ normalized encoder features before the projector,
    the mean of patches that become one token. Over an image's crops, or frames, jointly; kept
    tokens in raster order.

    Code and paper: τ_tv is 0.02 in the official core and 0.01 by default in its selector; here it
    is the core's. What becomes of positions is not known; here "published" renumbers them.

    Args:
        alpha: weight of the picture beside the text, 0.5 in the official code.
        text_temperature: τ_tv.
        vision_temperature: τ_vv, 0.2 in the official code.
    """

    name: ClassVar[str] = "mmtok"
    summary: ClassVar[str] = "tokens that cover the text and the other tokens"
    bibtex: ClassVar[str] = """@inproceedings{dong2026mmtok,
  title={MMTok: Multimodal Coverage Maximization for Efficient Inference of VLMs},
  author={Dong, Sixun and others},
  booktitle={International Conference on Learning Representations},
  year={2026}
}"""

    alpha: float = 0.5
    text_temperature: float = 0.02
    vision_temperature: float = 0.2

    def default_selector(self) -> Selector:
        """Greedy coverage of both."""
        return TextCoverage(self.alpha, self.text_temperature, self.vision_temperature)
