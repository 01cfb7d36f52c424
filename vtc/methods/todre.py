"""ToDRE: a diverse subset before the LLM, and no visual tokens in its last layers if text looks
elsewhere."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from vtc import ops
from vtc.errors import SignalError
from vtc.methods.base import Exactness, Method, Site
from vtc.scorers import Center, ClsAttention, Overview, RandomScores, Scorer
from vtc.scorers.layer_rows import text_after
from vtc.selectors import Count, FarthestPoint, MaxSum, Selector
from vtc.sites import Facts, LayerView
from vtc.types import Budget, Selection, Signal, Tokens, round_half_up


@dataclass(frozen=True, kw_only=True)
class ToDre(Method):
    """ToDRE (Li et al., arXiv 2505.18757v2; no official code: read from the paper's Algorithm 1).

    Stage 1, on L2-normalized tokens x `[N, D]` in the LLM's embedding space: from a pivot p on,
    S = x·x_p; k − 1 times c = argmin S is chosen and S += x·x_c. Over an image's crops, or a
    video's frames, jointly; sorted into original order, which the paper leaves open.

    Stage 2, once in the prefill, at decoder layer l = 7L/8: with the head-averaged causal attention
    A of layer index l − 1, V the visual tokens still there and T the text after the last of them,
    a_tv = mean_{i∈T} Σ_{j∈V} A_ij and a_vt = mean_{i∈V} Σ_{j∈T} A_ij. Where both are below τ, all
    visual tokens are gone from layer index l on. As T follows V, the causal mask makes a_vt zero
    and a_tv decides. A row without text after its images is left alone. Text keeps its positions.

    Where the paper leaves it open: heads are averaged for the pivot; l counts layers from 1 (its
    ablation at L, which saves nothing, fits that), is rounded half up, and is at least 1 and at
    most L − 1, so that layers without visual tokens remain; caches of the layers before stay.

    `keep` counts what stage 1 hands to the LLM; `keep=1.0` is the stock model. Stage 2 alone is
    `stage1=False` without `keep`.

    Args:
        objective: `"max_sum"` as in v2 of the paper, or `"k_center"`, the greedy k-center that the
            abstract of v1 names: S = max(S, x·x_c).
        pivot: the first choice. `"cls"` (the paper's default): the highest [CLS] attention of the
            last encoder block; where there is no [CLS], by random numbers as the paper does.
            `"random"`: by seed and picture. Both in the thumbnail only where an image has one.
            `"nearest"`, `"farthest"`: to or from the mean of x (the paper's ablation).
        stage1: whether to choose before the LLM.
        stage2: whether to drop the visual tokens in the LLM.
        tau: τ, 0.10 in the paper's settings and its ablation's choice of 0.03 to 0.15.
        earlier_kv: whether layers before l keep visual entries in the cache while decoding (the
            paper's text), or `"drop"` them.
    """

    name: ClassVar[str] = "todre"
    summary: ClassVar[str] = "a diverse subset, all of it dropped in late layers if text looks away"
    bibtex: ClassVar[str] = """@article{li2025todre,
  title={ToDRE: Effective Visual Token Pruning via Token Diversity and Task Relevance},
  author={Li, Duo and Yang, Zuhao and Zhang, Xiaoqin and Shao, Ling and Lu, Shijian},
  journal={arXiv preprint arXiv:2505.18757},
  year={2025}
}"""

    objective: Literal["max_sum", "k_center"] = "max_sum"
    pivot: Literal["cls", "random", "nearest", "farthest"] = "cls"
    stage1: bool = True
    stage2: bool = True
    tau: float = 0.10
    earlier_kv: Literal["keep", "drop"] = "keep"

    def __post_init__(self) -> None:
        super().__post_init__()
        why = "method 'none' is the one that keeps everything"
        self.expect(self.stage1 or self.stage2, f"one of them at least: {why}", "stage1", "stage2")

    @property
    def count(self) -> Count:  # type: ignore[override]  # the rest of the package only reads it
        """Exact before the LLM; stage 2 alone decides by itself."""
        return "exact" if self.stage1 else "adaptive"

    @property
    def site(self) -> Site:  # type: ignore[override]
        """Where the first choice acts."""
        return "llm_input" if self.stage1 else "llm_layer"

    @property
    def exactness(self) -> Exactness:  # type: ignore[override]
        """What the patched model equals."""
        return "layer_mask" if self.stage2 else "mask"

    @property
    def _composed(self) -> bool:
        return self.stage1

    def default_scorer(self) -> Scorer | None:
        """Scores whose highest is the pivot."""
        if not self.stage1:
            return None
        if self.pivot == "cls":
            return Overview(ClsAttention(Signal("cls_row", (-1,), stand_in="random_row")))
        return (
            Overview(RandomScores()) if self.pivot == "random" else Center(self.pivot == "nearest")
        )

    def default_selector(self) -> Selector:
        """The greedy choice from there."""
        return MaxSum() if self.objective == "max_sum" else FarthestPoint()

    def select(self, tokens: Tokens, budget: Budget) -> Selection:
        """Stage 1; everything without it."""
        if self.stage1:
            return super().select(tokens, budget)
        return Selection.everything(tokens.lengths, tokens.parent, tokens.grid)

    def check_facts(self, facts: Facts) -> None:
        """Stage 2 needs a layer after the one it looks at."""
        if self.stage2 and facts.llm_depth < 2:
            raise SignalError(
                f"method {self.name!r} drops visual tokens after a decoder layer, expected an LLM "
                f"of at least 2 layers, got {facts.llm_depth}: pass stage2=False"
            )

    def llm_layers(self, facts: Facts, budget: Budget | None = None) -> tuple[int, ...]:
        """Layer index l − 1, where stage 2 decides."""
        first_without = max(1, min(round_half_up(7 * facts.llm_depth / 8), facts.llm_depth - 1))
        return (first_without - 1,) if self.stage2 else ()

    def ratios(self, view: LayerView) -> tuple[Tensor, Tensor]:
        """a_tv and a_vt of each row, `float32[B]` each."""
        text_to_visual = self._text_to_visual(view, text_after(view))
        # no visual token stands behind the text after the last of them
        return text_to_visual, torch.zeros_like(text_to_visual)

    def _text_to_visual(self, view: LayerView, text: Tensor) -> Tensor:
        visual, parts = view.visual & view.mask, (view.query, view.key, view.scale, view.mask)
        return ops.causal_mass(*parts, text, visual, view.held)

    def layer_cut(self, view: LayerView, budget: Budget) -> Tensor:
        """All or none of the visual tokens of each row, `bool[G, N]`."""
        text = text_after(view)
        # a_vt, which is zero, is below any τ that a_tv is below
        drop = (self._text_to_visual(view, text) < self.tau) & text.any(-1)
        return view.valid & ~drop[view.parent[:, 1]][:, None]

    def capture_refusal(self) -> str | None:
        """None: the device decides alone."""
        return None

    @property
    def drops_earlier_kv(self) -> bool:
        """Whether the layers before l stop reading visual entries as well."""
        return self.earlier_kv == "drop"
