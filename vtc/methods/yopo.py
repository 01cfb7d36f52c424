"""YOPO: visual tokens see their neighbors, in some heads, and are gone from late layers."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import ClassVar, Literal

import torch
from torch import Tensor

from vtc.calibration.data import Calibration, calibration_of
from vtc.errors import SignalError
from vtc.methods.base import Exactness, Method, Site
from vtc.plans import LayerPlan, LayerRule
from vtc.sites import Facts, LayerView
from vtc.types import Budget, Tokens, round_half_up

# heads of the first two layers are never pruned (official code)
_WHOLE_LAYERS = 2


@dataclass(frozen=True, kw_only=True)
class Yopo(Method):
    """YOPO (Zhang et al., arXiv 2410.06169; official code ZhangAIPI/YOPO_MLLM_Pruning), without
    fine-tuning.

    Neighbors: a visual row sees the text before it and, of visual tokens, those before it in its
    own grid at most (w − 1)/2 rows and columns away. Heads: in a pruned head no row reads visual
    tokens and visual rows get nothing. Layers: from layer c on there are no visual tokens.

    The official code simulates this with masks and differs: overwriting the mask lets neighbors see
    later ones (here the causal mask stays); the attention that pruned heads and late layers pay to
    visual tokens vanishes without renormalization (`renormalize=False` does that in pruned heads);
    its Qwen2-VL file masks 15 visual rows too few or doubles logits. The feed-forward cut needs
    fine-tuning and is left out. LLaVA's published accuracies are after fine-tuning.

    `keep` is the share of decoder layers that see visual tokens: c = ⌊keep·L + 0.5⌋.

    Args:
        window: w, 5 in the official script: 5×5 neighbors; None: all.
        heads: share of the heads of layers 2.. that go on reading visual tokens, those with the
            highest ratio of attention to visual tokens over attention to text (30 of 40 in the
            official script for 13B); 1.0: all, and no calibration is needed. The official masks are
            not published as numbers.
        renormalize: whether attention in pruned heads is shared out among text.
        calibration: where the heads' ratios are from: a `vtc.Calibration`, its file or the folder
            that holds it; None: the file beside the model's weights.
    """

    name: ClassVar[str] = "yopo"
    summary: ClassVar[str] = "visual tokens see neighbors, in some heads, and leave late layers"
    site: ClassVar[Site] = "llm_rows"
    exactness: ClassVar[Exactness] = "restatement"
    published_positions: ClassVar[Literal["keep"]] = "keep"
    bibtex: ClassVar[str] = """@article{zhang2024treat,
  title={Treat Visual Tokens as Text? But Your MLLM Only Needs Fewer Efforts to See},
  author={Zhang, Zeliang and others},
  journal={arXiv preprint arXiv:2410.06169},
  year={2024}
}"""

    window: int | None = 5
    heads: float = 0.75
    renormalize: bool = True
    calibration: Calibration | str | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        odd = self.window is None or (self.window >= 1 and self.window % 2 == 1)
        wanted = "an odd number of at least 1, such as 5 for a neighborhood of 5×5, or None"
        self.expect(odd, wanted, "window")
        self.expect(0 < self.heads <= 1, "a share in (0, 1]", "heads")

    @property
    def _composed(self) -> bool:
        return False

    def keeps_all(self, budget: Budget, lengths: Iterable[int]) -> bool:
        """Only where no part of it does anything."""
        return budget.keep == 1.0 and self.heads == 1.0 and self.window is None

    def plan(self, layers: Tokens, facts: Facts, budget: Budget) -> LayerPlan:
        """Neighbors and heads in the layers that see visual tokens."""
        radius = None if self.window is None else (self.window - 1) // 2
        last = self._seeing(facts, budget)
        rule = LayerRule(radius=radius)
        rules = [rule if layer < last else LayerRule() for layer in range(facts.llm_depth)]
        if self.heads == 1.0:
            return LayerPlan(tuple(rules))
        kept = self._kept_heads(facts)
        for layer in range(_WHOLE_LAYERS, last):
            rules[layer] = replace(rule, heads=kept[layer], renormalize=self.renormalize)
        return LayerPlan(tuple(rules))

    def _kept_heads(self, facts: Facts) -> Tensor:
        """`bool[L, H]`; ties go to the lower layer, then to the lower head."""
        found = calibration_of(self.calibration, facts, "head_ratio")
        ratio = torch.tensor(found.head_ratio)[_WHOLE_LAYERS:]
        count = max(1, round_half_up(self.heads * ratio.numel()))
        chosen = ratio.flatten().argsort(descending=True, stable=True)[:count]
        kept = torch.ones(facts.llm_depth, facts.llm_heads, dtype=torch.bool)
        kept[_WHOLE_LAYERS:] = False
        kept[_WHOLE_LAYERS:].view(-1)[chosen] = True
        return kept

    def _seeing(self, facts: Facts, budget: Budget) -> int:
        """c, how many layers see visual tokens."""
        return budget.count(facts.llm_depth)

    def llm_layers(self, facts: Facts, budget: Budget | None = None) -> tuple[int, ...]:
        """Layer index c − 1."""
        if budget is None:
            return ()
        last = self._seeing(facts, budget)
        if last - 1 < facts.first_layer_cut:
            raise SignalError(
                f"method {self.name!r} with keep={budget.keep} lets {last} of {facts.llm_depth} "
                f"layers see visual tokens, expected at least {facts.first_layer_cut + 1}: this "
                "model adds encoder features behind the first layers; pass a higher keep"
            )
        return (last - 1,) if last < facts.llm_depth else ()

    def layer_cut(self, view: LayerView, budget: Budget) -> Tensor:
        """None of the tokens is left."""
        return torch.zeros_like(view.valid)
