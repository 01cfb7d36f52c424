"""SparseVLM: in stages, what the words of the prompt that have to do with the image look at, and
the rest in clusters."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from vtc.errors import VtcError
from vtc.mergers.clusters import cluster_count, recycled
from vtc.methods.base import Exactness
from vtc.methods.layer_cuts import LayerCuts, cut_behind, interpolated, rising
from vtc.scorers import RaterRows, Scorer
from vtc.scorers.layer_signals import seen_tokens
from vtc.sites import Facts, LayerCut, LayerView

# of 576 tokens, those left behind each stage, clusters included, of the budgets 64, 96, 128, 192
_V1 = ((82, 32, 18), (249, 55, 27), (312, 117, 39), (309, 204, 113))
_PLUS = ((66, 34, 20), (246, 54, 28), (238, 108, 60), (300, 200, 118))


@dataclass(frozen=True, kw_only=True)
class SparseVlm(LayerCuts):
    """SparseVLM (Zhang et al., ICML 2025, arXiv 2410.04417; official code Gumpest/SparseVLMs), and
    the variant of its version 2.0, SparseVLM+.

    Raters are text tokens behind the last image: with M the mean over visual tokens v of softmax
    over text t of v·t, input embeddings, those above the mean of M. Behind layers 2, 6 and 15 of
    32, a visual token's score is the attention of that layer that raters pay to it, the mean over
    heads and raters; the highest stay, in order. Recycling: of the D others the ⌊0.3·D⌋ + 1 highest
    are clustered by density peaks on their hidden states into c = ⌊(⌊0.3·D⌋ + 1)/10⌋ + 1, of c
    nearest neighbors, and each cluster's mean goes on.

    `"plus"`: attention is divided by q·k of all-ones queries and keys with rotary positions, only
    the 14 of 32 heads count that look at the image most (over raters), and nothing is recycled.

    Schedules are published for four budgets and interpolated linearly in keep, the tokens left in
    the end with their clusters: what is called 64, 96, 128 and 192 is keep = 18, 27, 39 and 113 of
    576 (`"plus"`: 20, 28, 60, 118). These names are averages over layers if layers 2, 6 and 15
    count as cut already; the layers run in full in the code, so that `budget="layer_mean"` is
    14 to 18 more there.

    Code and paper: no count adapts to the rank of attention in the code. Its clusters stand behind
    the kept tokens, here at their center; positions are renumbered at every stage (`"plus"`: kept).
    Densities are told apart by random noise there, by order here.

    Args:
        variant: version 1 or SparseVLM+.
        recycle: whether dropped tokens are clustered; None: in version 1.
        layers: of 32 and scaled to others; one for each stage of the schedule.
    """

    name: ClassVar[str] = "sparsevlm"
    summary: ClassVar[str] = "in stages, tokens that related words attend to, others in clusters"
    bibtex: ClassVar[str] = """@inproceedings{zhang2025sparsevlm,
  title={SparseVLM: Visual Token Sparsification for Efficient Vision-Language Model Inference},
  author={Zhang, Yuan and Fan, Chun-Kai and Ma, Junpeng and Zheng, Wenzhao and Huang, Tao and
          Cheng, Kuan and Gudovskiy, Denis and Okuno, Tomoyuki and Nakata, Yohei and
          Keutzer, Kurt and Zhang, Shanghang},
  booktitle={International Conference on Machine Learning},
  year={2025}
}"""

    variant: Literal["v1", "plus"] = "v1"
    recycle: bool | None = None
    layers: tuple[int, int, int] = (2, 6, 15)

    def __post_init__(self) -> None:
        super().__post_init__()
        self.expect(rising(self.layers, 0), "three ascending numbers", "layers")

    @property
    def published_positions(self) -> Literal["keep", "renumber"]:  # type: ignore[override]
        """As the variant's code has it."""
        return "renumber" if self.variant == "v1" else "keep"

    @property
    def exactness(self) -> Exactness:  # type: ignore[override]  # the rest only reads it
        """Whether tokens are merged."""
        return "restatement" if self._recycles else "layer_mask"

    @property
    def _recycles(self) -> bool:
        return self.variant == "v1" if self.recycle is None else self.recycle

    def default_scorer(self) -> Scorer:
        """Attention of the raters."""
        return RaterRows(corrected=self.variant == "plus")

    def cuts(self, facts: Facts) -> tuple[int, ...]:
        """The layers that are looked at."""
        return tuple(cut_behind(layer, facts) for layer in self.layers)

    def shares(self, share: float) -> tuple[float, ...]:
        """As published, in between linearly."""
        return interpolated(_V1 if self.variant == "v1" else _PLUS, 576, share)

    def chosen(self, view: LayerView, counts: Tensor) -> Tensor | LayerCut:
        """The highest scores and, recycled, the centers of clusters of others."""
        if not self._recycles:
            return super().chosen(view, counts)
        if view.hidden is None:
            raise VtcError(f"method {self.name!r} got a view without hidden states")
        left = view.valid.sum(-1).tolist()
        clusters = [cluster_count(n, count) for n, count in zip(left, counts.tolist(), strict=True)]
        kept = super().chosen(view, counts - torch.tensor(clusters))
        assert isinstance(kept, Tensor)
        tokens = seen_tokens(view, self._asked)
        scores = self.active_scorer(tokens) if self.active_scorer else None
        return recycled(tokens.features, scores, kept, view.valid, clusters)
