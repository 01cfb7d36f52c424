"""VScan: windows of the picture and its whole before the LLM, the rest merged in, and a last cut in
the middle of the LLM."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import ClassVar, Literal

import torch

from vtc.methods.base import Exactness, Site
from vtc.methods.layer_cuts import LayerCuts, cut_before
from vtc.scorers import ClsAttention, LastRow, Scorer
from vtc.scorers.cls_attention import AT_TAP
from vtc.selectors import Count
from vtc.selectors.by_row import ByRow
from vtc.selectors.local_global import LocalGlobal
from vtc.sites import Facts
from vtc.types import Budget, Selection, Signal, Tokens


@dataclass(frozen=True, kw_only=True)
class VScan(LayerCuts):
    """VScan (Zhang et al., arXiv 2505.22654; official code Tencent/SelfEvolvingAgent).

    Before the LLM, of T1 tokens: ⌊T1/2⌋ are those that [CLS] attends to most in block 5 of 24, the
    same number in each of 4×4 windows (of 6×6 patches in LLaVA-1.5); the others those it attends to
    most in the block that the LLM reads (22), among the rest. Every token that is dropped is merged
    into the kept one of highest cosine similarity in the LLM's embedding space, (kept + Σ)/(1 + n).
    In the LLM, before layer 16 of 32, the T that the prompt's last token attends to most in that
    layer stay, as in PyramidDrop. T1 = 3T as published (96 and 32 for an average of 64), for
    Qwen2.5-VL before layer 14 of 28, which is the same place.

    Code and paper: where ⌊T1/2⌋ is not a multiple of 16, the official code keeps fewer tokens
    (`faithful=True`); here some windows give one more. It renumbers positions. Crops and frames of
    an image share T1 and decide each by itself, which the paper leaves open. Without [CLS]: the
    attention that a patch receives, the mean over all queries.

    Args:
        layer: of 32 layers and scaled to others.
        ratio: T1 / T, 3 as published.
        faithful: every window gives the same number, rounded down.
    """

    name: ClassVar[str] = "vscan"
    summary: ClassVar[str] = "windows and the whole before the LLM, the rest merged, a cut inside"
    site: ClassVar[Site] = "llm_input"
    exactness: ClassVar[Exactness] = "restatement"
    published_positions: ClassVar[Literal["keep", "renumber", "median"]] = "renumber"
    bibtex: ClassVar[str] = """@article{zhang2025vscan,
  title={VScan: Rethinking Visual Token Reduction for Efficient Large Vision-Language Models},
  author={Zhang, Ce and Ma, Kaixin and Fang, Tianqing and Yu, Wenhao and Zhang, Hongming and
          Zhang, Zhisong and Mi, Haitao and Yu, Dong},
  journal={arXiv preprint arXiv:2505.22654},
  year={2025}
}"""

    layer: int = 16
    ratio: float = 3.0
    faithful: bool = False
    facts: Facts | None = field(default=None, repr=False, compare=False)

    @property
    def count(self) -> Count:  # type: ignore[override]  # the rest only reads it
        """Exact, unless windows round down."""
        return "at_most" if self.faithful else super().count

    @property
    def _composed(self) -> bool:
        return False

    def __post_init__(self) -> None:
        super().__post_init__()
        self.expect(self.layer >= 1 and self.ratio >= 1, "at least 1 each", "layer", "ratio")

    @property
    def needs(self) -> tuple[Signal, ...]:
        """What [CLS] attends to in two blocks."""
        return (*self._scorer.needs, *self._selector.needs)

    @property
    def _scorer(self) -> Scorer:
        return ClsAttention(AT_TAP)

    @property
    def _selector(self) -> ByRow:
        return ByRow(LocalGlobal(equal=self.faithful))

    def default_scorer(self) -> Scorer:
        """In the LLM: attention of the last entry in the layer behind the cut."""
        return LastRow(ahead=True)

    def on(self, facts: Facts) -> VScan:
        """An average over layers needs to know how many there are."""
        return replace(self, facts=facts)

    def cuts(self, facts: Facts) -> tuple[int, ...]:
        """The layer before the last cut."""
        return (cut_before(self.layer, facts),)

    def entrance(self, share: float) -> float:
        """T1."""
        return min(1.0, self.ratio * share)

    def select(self, tokens: Tokens, budget: Budget) -> Selection:
        """Windows and the whole, with the others merged."""
        scores = self._scorer(tokens)
        lasts = budget.counts(tokens.lengths, tokens.parent).tolist()
        counts = [
            self.entering(n, last / max(n, 1), self.facts)
            for n, last in zip(tokens.lengths, lasts, strict=True)
        ]
        return self._selector(tokens, scores, torch.tensor(counts, dtype=torch.int64))
