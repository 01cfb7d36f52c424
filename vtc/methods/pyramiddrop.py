"""PyramidDrop: three times on its way through the LLM, a share of the visual tokens leaves."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from vtc.methods.layer_cuts import LayerCuts, cut_before, rising
from vtc.scorers import LastRow, Scorer
from vtc.sites import Facts


@dataclass(frozen=True, kw_only=True)
class PyramidDrop(LayerCuts):
    """PyramidDrop (Xing et al., CVPR 2025, arXiv 2410.17247; code Cooperx521/PyramidDrop).

    Once 8, 16 and 24 of 32 layers have run, the queries and keys of the next layer are projected
    from the hidden states, positions applied; with the last entry of the prompt as the query, its
    softmax over everything before it is averaged over heads, and of N tokens of an image the N·λ^s
    highest of those that are left stay behind stage s, in order: λ = 0.5 as published (270 of 576
    tokens on average). Here keep = λ³: 0.125 as published. `budget="layer_mean"` finds the λ of an
    average.

    Code and paper: the code renumbers positions at every stage, in later steps too, and rounds
    counts down. Rows of tables with less than a quarter of all tokens on average use other people's
    schedules: pass `layers`.

    Args:
        layers: how many layers have run at each stage, of 32 and scaled to others.
    """

    name: ClassVar[str] = "pyramiddrop"
    summary: ClassVar[str] = "in stages, tokens that the last text token attends to next"
    published_positions: ClassVar[Literal["keep", "renumber", "median"]] = "renumber"
    bibtex: ClassVar[str] = """@inproceedings{xing2025pyramiddrop,
  title={PyramidDrop: Accelerating Your Large Vision-Language Models via Pyramid Visual Redundancy
         Reduction},
  author={Xing, Long and Huang, Qidong and Dong, Xiaoyi and Lu, Jiajie and Zhang, Pan and
          Zang, Yuhang and Cao, Yuhang and He, Conghui and Wang, Jiaqi and Wu, Feng and
          Lin, Dahua},
  booktitle={Proceedings of the IEEE/CVF Conference on Computer Vision and Pattern Recognition},
  year={2025}
}"""

    layers: tuple[int, ...] = (8, 16, 24)

    def __post_init__(self) -> None:
        super().__post_init__()
        self.expect(rising(self.layers, 1), "ascending numbers of layers from 1 on", "layers")

    def default_scorer(self) -> Scorer:
        """Attention of the last entry in the layer behind the cut."""
        return LastRow(ahead=True)

    def cuts(self, facts: Facts) -> tuple[int, ...]:
        """The layer before each stage."""
        return tuple(cut_before(layer, facts) for layer in self.layers)

    def shares(self, share: float) -> tuple[float, ...]:
        """λ, λ², λ³."""
        return tuple(share ** (s / len(self.layers)) for s in range(1, len(self.layers) + 1))
