"""CDPruner: tokens that differ from each other as far as they matter for the question."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from vtc.methods.base import Method
from vtc.scorers import Scorer, TextRelevance
from vtc.scorers.clip_relevance import ClipRelevance
from vtc.selectors import ByRow, DppMap, Selector


@dataclass(frozen=True, kw_only=True)
class CdPruner(Method):
    """CDPruner (Zhang et al., NeurIPS 2025, arXiv 2506.10967; official code Theia-4869/CDPruner).

    Kernel L = diag(r)·S·diag(r): S `[N, N]` cosines of tokens in the LLM's embedding space, r `[N]`
    relevance to the text brought to (0, 1] by (r − min + 1e-6)/(max − min). Greedy MAP: T times the
    token that adds most to det L of those chosen. In float32, every crop by itself.

    Relevance is the mean cosine to the LLM's embeddings of the text behind the row's last image, as
    the paper does where a model has no text tower. The published numbers for LLaVA are with CLIP's
    text tower instead, whose cosines are negated: `clip` makes it that.

    Code and paper: min and max of the official code run over all crops of all images of the call,
    so that an image depends on its company; here they are a crop's own. The paper's exponent that
    trades relevance for diversity is commented out in the official code. It renumbers positions.

    Args:
        clip: folder of the CLIP model that the vision tower is from, or None.
        tokenizer: folder of the LLM's tokenizer, to read the question; None: that of the model.
        faithful: min and max over the whole call.
    """

    name: ClassVar[str] = "cdpruner"
    summary: ClassVar[str] = "diverse tokens weighted by relevance to the text (DPP)"
    bibtex: ClassVar[str] = """@inproceedings{zhang2025cdpruner,
  title={Beyond Attention or Similarity: Maximizing Conditional Diversity for Token Pruning in
         MLLMs},
  author={Zhang, Qizhe and others},
  booktitle={Advances in Neural Information Processing Systems},
  year={2025}
}"""

    clip: str | None = None
    tokenizer: str | None = None
    faithful: bool = False

    def default_scorer(self) -> Scorer:
        """Relevance to the text."""
        return ClipRelevance(self.clip, self.tokenizer) if self.clip else TextRelevance()

    def default_selector(self) -> Selector:
        """The greedy determinantal point process."""
        return ByRow(DppMap(together=self.faithful))
