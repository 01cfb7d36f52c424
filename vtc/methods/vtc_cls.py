"""VTC-CLS: keep the patches that [CLS] attends to, summed over the last blocks of the encoder."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from vtc.methods.base import Method
from vtc.scorers import ClsAttention, Scorer
from vtc.selectors import Selector, TopK
from vtc.types import Signal


@dataclass(frozen=True, kw_only=True)
class VtcCls(Method):
    """VTC-CLS (Wang et al., arXiv 2412.05819; official code THU-MIG/VTC-CLS, Apache-2.0).

    Score of patch j: s[j] = Σ_l mean_h A_l[h, CLS, j] over blocks l = start..tap, where the tap is
    the block whose output the LLM reads (22 of 24 in LLaVA-1.5). The softmax includes [CLS] itself
    and is not renormalized. The U highest are kept, in raster order; nothing is merged.

    Code and paper: the evaluation scripts never say which `start` produced the published table; 16
    is the argument parser's default. The official code renumbers positions
    (`positions="published"`) and is wrong for more than one image per call; here each image is
    scored alone. The official scores are in the model's dtype; here they are float32.

    Encoders without [CLS] are not in the paper. There the row of another query stands in, summed
    over the same blocks: by default that of the mean query (mean over the image's patches, rotary
    positions applied), which is what FlowCut's official code uses on Qwen2-VL.

    Args:
        start: first block read, for an encoder of 24 blocks and scaled to others; a negative one
            counts from the end like a Python slice (−2 is the penultimate block alone).
        ensemble: how blocks are combined; the official code implements `"sum"` and mentions the
            others.
        stand_in: what is scored by on encoders without [CLS]: the attention of the mean query, or
            the attention that a patch receives, the mean over all queries. Ours.
    """

    name: ClassVar[str] = "vtc_cls"
    summary: ClassVar[str] = "patches that [CLS] attends to, summed over the last encoder blocks"
    bibtex: ClassVar[str] = """@article{wang2024cls,
  title={[CLS] Token Tells Everything Needed for Training-free Efficient MLLMs},
  author={Wang, Ao and Sun, Fengyuan and Chen, Hui and Lin, Zijia and Han, Jungong and
          Ding, Guiguang},
  journal={arXiv preprint arXiv:2412.05819},
  year={2024}
}"""

    start: int = 16
    ensemble: Literal["sum", "min", "max"] = "sum"
    stand_in: Literal["mean_query", "received"] = "mean_query"

    def default_scorer(self) -> Scorer:
        """Attention of [CLS] over blocks start..tap."""
        # the official slice is attentions[start:-1]
        blocks = range(self.start, 23) if self.start >= 0 else range(self.start, -1)
        window = Signal(
            "cls_row",
            blocks or (self.start,),
            depth=24,
            ends_at_tap=True,
            stand_in=f"{self.stand_in}_row",
        )
        return ClsAttention(window, self.ensemble)

    def default_selector(self) -> Selector:
        """The highest scores."""
        return TopK()
