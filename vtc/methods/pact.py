"""PACT: what the image itself looks at least goes, and the rest is clustered by its keys."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from vtc.errors import SignalError, VtcError
from vtc.mergers.clusters import with_clusters
from vtc.methods.base import Exactness, Method, Site
from vtc.methods.layer_cuts import cut_before
from vtc.selectors import Count
from vtc.selectors.bounded_clusters import centers_in_reach, cosine_distances, highest_share
from vtc.sites import Facts, LayerCut, LayerView
from vtc.types import Budget


@dataclass(frozen=True, kw_only=True)
class Pact(Method):
    """PACT (Dhouib et al., CVPR 2025, arXiv 2504.08966; official code orailix/PACT).

    In front of layer 4 of 32, with that layer's queries and keys and the hidden states h that enter
    it, over the visual tokens of an image:

    1. score_i = mean over heads of softmax_i(q̄·k_i/√d) · ‖h_i‖₂, without rotary positions, q̄ the
       mean query of the image's tokens. The ⌊λ·N⌋ highest are important.
    2. The important ones are clustered by the cosine distance of their keys, positions applied,
       heads side by side: centers are more than d_c apart and every one has a center within d_c.
    3. Every token within 1.5·d_c of a center belongs to the nearest, unimportant ones too; others
       are gone. A center becomes the mean of its cluster, in its place and at its position, and
       log(size) is added to the attention logits on it in all later layers.

    How many stay follows from the picture. Attention must be `"sdpa"` or `"eager"`.

    Code and paper: the official search for centers goes round by round and turns to one point after
    the other for rounds of fewer than 10; both give the same centers. It compares strictly with the
    ⌊λ·N⌋-th highest score and adds what equals it, the first ones, up to as many.

    Args:
        layer: of 32 layers and scaled to others; 4 as published.
        importance: λ, the share that is important; 0.55 in the official configuration.
        cutoff: d_c, 0.21 as published.
        reach: times d_c, 1.5 as published.
        proportional: whether log(size) is added.
    """

    name: ClassVar[str] = "pact"
    summary: ClassVar[str] = "from layer 4 on, clusters of important tokens, weighed by their size"
    site: ClassVar[Site] = "llm_layer"
    count: ClassVar[Count] = "adaptive"
    exactness: ClassVar[Exactness] = "restatement"
    published_positions: ClassVar = "keep"
    bibtex: ClassVar[str] = """@inproceedings{dhouib2025pact,
  title={PACT: Pruning and Clustering-Based Token Reduction for Faster Visual Language Models},
  author={Dhouib, Mohamed and Buscaldi, Davide and Vanier, Sonia and Shabou, Aymen},
  booktitle={Proceedings of the IEEE/CVF Conference on Computer Vision and Pattern Recognition},
  year={2025}
}"""

    layer: int = 4
    importance: float = 0.55
    cutoff: float = 0.21
    reach: float = 1.5
    proportional: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        self.expect(self.layer >= 1 and self.reach >= 1, "at least 1 each", "layer", "reach")
        self.expect(0 < self.importance <= 1, "a share in (0, 1]", "importance")
        self.expect(self.cutoff >= 0, "a distance of at least 0", "cutoff")

    def check_facts(self, facts: Facts) -> None:
        """A layer behind the cut."""
        if facts.llm_depth < 2 or cut_before(self.layer, facts) > facts.llm_depth - 2:
            raise SignalError(
                f"method {self.name!r} merges visual tokens before decoder layer {self.layer} of "
                f"32, expected an LLM with layers behind it, got {facts.llm_depth} layers"
            )

    def llm_layers(self, facts: Facts, budget: Budget | None = None) -> tuple[int, ...]:
        """The layer before."""
        return (cut_before(self.layer, facts),)

    def layer_cut(self, view: LayerView, budget: Budget) -> LayerCut:
        """Centers, and what becomes of the others."""
        if view.hidden is None:
            raise VtcError(f"method {self.name!r} got a view without hidden states")
        plain, turned = view.next_layer(rotary=False), view.next_layer()
        past, clusters = plain.key.shape[2] - view.mask.shape[1], []
        for g, row in enumerate(view.parent[:, 1].tolist()):
            (at,) = view.valid[g].nonzero(as_tuple=True)
            own = view.columns[g, at]
            query = plain.query[row][:, own].float().mean(1)  # [H, d]
            key = plain.key[row][:, own + past].float()  # [H, n, d]
            looks = (torch.einsum("hd,hnd->hn", query, key) * plain.scale).softmax(-1).mean(0)
            scores = looks * view.hidden[row, own].float().norm(dim=-1)
            keys = turned.key[row][:, own + past].transpose(0, 1).flatten(1)
            important = highest_share(scores, self.importance)
            distance = cosine_distances(keys)
            center = centers_in_reach(distance, important, self.cutoff, self.reach * self.cutoff)
            clusters.append((g, at, center))
        return with_clusters(LayerCut.alone(view.valid), clusters, sized=self.proportional)
