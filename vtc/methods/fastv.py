"""FastV: behind the second decoder layer, the visual tokens that the prompt's last token attends to
stay."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from vtc.methods.layer_cuts import LayerCuts, cut_before
from vtc.scorers import LastRow, Scorer
from vtc.sites import Facts


@dataclass(frozen=True, kw_only=True)
class FastV(LayerCuts):
    """FastV (Chen et al., ECCV 2024, arXiv 2403.06764; official code pkunlp-icler/FastV).

    Layers 0..K−1 see everything. With A the attention of layer index K − 1, heads averaged, and t
    the last entry of the prompt, visual token j scores A[t, j]; the highest stay, in order and at
    their positions, from layer K on.

    Code and paper: the paper averages the attention that a token receives, the code reads the row
    of the last input token, which is the rule here. The official variants that mask instead of
    dropping, or whose first batch item decides for all, agree with this for one image where
    nothing else differs. With K = 0 they drop at random: refused here, see `random`.

    The tables' "64 tokens on average" are `budget="layer_mean"`: (32·64 − 2·576) / 30 = 30 of 576
    behind layer 2.

    Args:
        k: K, of 32 layers and scaled to others; 2 in the paper, whose R is 1 − keep.
    """

    name: ClassVar[str] = "fastv"
    summary: ClassVar[str] = "from layer 2 on, tokens that the last text token attends to"
    bibtex: ClassVar[str] = """@inproceedings{chen2024image,
  title={An Image is Worth 1/2 Tokens After Layer 2: Plug-and-Play Inference Acceleration for
         Large Vision-Language Models},
  author={Chen, Liang and Zhao, Haozhe and Liu, Tianyu and Bai, Shuai and Lin, Junyang and
          Zhou, Chang and Chang, Baobao},
  booktitle={European Conference on Computer Vision},
  year={2024}
}"""

    k: int = 2

    def __post_init__(self) -> None:
        super().__post_init__()
        why = "no attention is known before layer 0; method 'random' drops without one"
        self.expect(self.k >= 1, f"at least 1: {why}", "k")

    def default_scorer(self) -> Scorer:
        """Attention of the last entry."""
        return LastRow()

    def cuts(self, facts: Facts) -> tuple[int, ...]:
        """Layer index K − 1."""
        return (cut_before(self.k, facts),)
