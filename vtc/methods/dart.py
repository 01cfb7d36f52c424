"""DART: a few pivots of large keys, and the tokens least like each of them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn.functional import normalize

from vtc.errors import VtcError
from vtc.methods.layer_cuts import LayerCuts, cut_before
from vtc.scorers.layer_rows import asked_text
from vtc.selectors.opposed import largest, with_opposed
from vtc.sites import Facts, LayerView


@dataclass(frozen=True, kw_only=True)
class Dart(LayerCuts):
    """DART (Wen et al., EMNLP 2025, arXiv 2502.11494; official code ZichenWen1/DART).

    From layer K on: with x the hidden states in front of it behind the language model's last norm,
    and keys those of layer index K − 1, positions applied, heads side by side, the visual tokens
    and the text tokens (behind the last image) of largest L1 key norm are pivots, four each. One
    pivot after the other takes the k visual tokens of lowest cosine to it that are not taken yet;
    these and the visual pivots stay, in order and at their positions.

    Code and paper: official k = ⌊T/8⌋, so that 4 + 8k tokens stay (132 for the scripts' 128, which
    override the ratio): here T stay, T − 4 of them shared evenly, the first pivots taking one more.
    With keep = 4 + 8k both agree. The order of pivots in the official code is that in which
    CPython iterates over a set of their places in the sequence; here it is visual pivots, then
    text, by falling norm. Ports differ in whether keys have positions; a rotation changes L1 norms.

    Args:
        layer: K, of 32 layers and scaled to others; 2 as published.
        image_pivots: 4 as published.
        text_pivots: 4 as published; fewer where there is less text.
        faithful: pivots in the order of the official code.
    """

    name: ClassVar[str] = "dart"
    summary: ClassVar[str] = "from layer 2 on, pivots and the tokens least like each of them"
    bibtex: ClassVar[str] = """@inproceedings{wen2025stop,
  title={Stop Looking for Important Tokens in Multimodal Language Models: Duplication Matters More},
  author={Wen, Zichen and Gao, Yifeng and Wang, Shaobo and Zhang, Junyuan and Zhang, Qintong and
          Li, Weijia and He, Conghui and Zhang, Linfeng},
  booktitle={Proceedings of the Conference on Empirical Methods in Natural Language Processing},
  year={2025}
}"""

    layer: int = 2
    image_pivots: int = 4
    text_pivots: int = 4
    faithful: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        self.expect(self.layer >= 1, "at least 1", "layer")
        self.expect(self.image_pivots >= 1, "at least 1", "image_pivots")
        self.expect(self.text_pivots >= 0, "at least 0", "text_pivots")

    @property
    def _composed(self) -> bool:
        return False

    def cuts(self, facts: Facts) -> tuple[int, ...]:
        """Layer index K − 1."""
        return (cut_before(self.layer, facts),)

    def chosen(self, view: LayerView, counts: Tensor) -> Tensor:
        """Pivots and what is opposed to them, `bool[G, N]`."""
        if view.hidden is None or view.final_norm is None:
            raise VtcError(f"method {self.name!r} got a view without hidden states or last norm")
        x = normalize(view.final_norm(view.hidden).float(), dim=-1)  # [B, S, D]
        entries = view.mask.shape[1]
        norms = view.key[:, :, -entries:].float().abs().sum((1, 3))  # [B, S]
        text = asked_text(view) if self.text_pivots else torch.zeros_like(view.mask)
        keep = view.valid.clone()
        for g, (row, count) in enumerate(zip(view.parent[:, 1].tolist(), counts.tolist())):  # noqa: B905
            if count < int(view.valid[g].sum()):
                own = view.columns[g][view.valid[g]]
                pivots = self._pivots(norms[row], own, text[row], count, view.mask[row])
                taken = with_opposed(x[row], own, *pivots, count)
                keep[g] = keep[g].masked_scatter(view.valid[g], taken)
        return keep

    def _pivots(
        self, norms: Tensor, own: Tensor, text: Tensor, count: int, mask: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Which of the tokens at columns `own [N]` of one row are pivots, and all pivots' columns
        in order."""
        image = largest(norms[own], torch.ones_like(own).bool(), min(self.image_pivots, count))
        pivots = torch.cat([own[image], largest(norms, text, self.text_pivots)])
        if self.faithful:
            first = int(mask.int().argmax())
            ordered = list(set((pivots - first).tolist()))
            pivots = torch.tensor(ordered, device=own.device) + first
        return image, pivots
