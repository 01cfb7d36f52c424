"""FlowCut: patches leave the encoder block by block; where rows are many or there is no [CLS], the
text has the last word inside the LLM."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar, Literal

import torch
from torch import Tensor

from vtc import ops
from vtc.checks import require_none
from vtc.dispatch import constant
from vtc.errors import InputError, SignalError
from vtc.methods.base import Exactness, Method, Site
from vtc.scorers import Scorer
from vtc.scorers.flow import (
    Flow,
    block_tokens,
    flow_step,
    last_entry,
    layer_tokens,
    units_left,
)
from vtc.selectors import Selector, TopK, mask_over
from vtc.selectors.base import check_numbers
from vtc.selectors.shares import Sharing, even_shares, roomy_shares, row_targets
from vtc.sites import BlockView, Cut, Facts, LayerView
from vtc.types import Budget, Signal, Tokens

# the signals that the views give
_GIVEN = {"flow", "cls_row", "image_key"}


@dataclass(frozen=True, kw_only=True)
class FlowCut(Method):
    """FlowCut (Tong et al., NeurIPS 2025, arXiv 2505.19536; official code TungChintao/FlowCut,
    Apache-2.0).

    In the encoder, after each block b up to the last cut at block tap − 1 (21 of 24 in LLaVA-1.5),
    per patch j of a row, heads averaged: a = attention of [CLS], g = softmax(v_CLS·v_j) without a
    scale, both with [CLS] in the softmax; m = ‖mean_h v_j‖₁; S = (a/Σa + g/Σg)·m. Cumulative score:
    S at first, then half the old and half the new. With rpl = tap − 1 − b blocks to go, even rpl
    cuts: P = (n − T)/√rpl · (1 − R²), R = H(a/Σa)/log n, leaves max(n − round(P), T) of n patches
    (round half to even), rpl = 0 leaves T. The highest stay, in order; a and P follow each cut. All
    crops of an image drop the largest P among them.

    Without [CLS]: a = attention of the row's mean query, rotary positions applied, and S = a·m. The
    m patches of one LLM token are scored by their mean and live or die together: n and T count
    patches, P/m is rounded. T of a row, for `keep` T tokens of its image: T, where that is the only
    cut. Before a cut in the LLM: 2T if the image is one row, as published for Qwen2-VL; ⌊T/2⌋ per
    row if it is several, as published for LLaVA-NeXT.

    In the LLM, after layer index 1: S of the visual tokens with q, v of the row's last token in
    place of [CLS], softmaxes over the image's visual keys alone and both scaled; T highest stay.
    Where encoder features are added behind the first n layers (DeepStack), after layer n − 1.

    Code and paper. Notes on the paper have cosine similarity for g; the code's dot products are the
    rule here. Scores are float32 (official: the model's dtype), and 0·log 0 = 0 (official: NaN, or
    log(p + 1e-7) on Qwen). Official Qwen code cuts single patches, whose merger then fuses
    strangers, attends across images, and ends after the last block; here tokens are cut whole, per
    row, the last time where a block still profits. It leaves a and g of the LLM score unnormalized:
    over visual keys alone both sum to 1, so that this changes nothing. Official NeXT code lets what
    pads the canvas compete and loses what is kept of it; here only patches that reach the LLM
    compete. ⌊T/2⌋ per row would keep all of an image of many rows: beyond five rows, the published
    case, a row gets at most ⌈2.5T/rows⌉, and more where T would not be left (both ours). Frames of
    a video share T where there is a [CLS]: the paper's videos have no code.

    `scorer` gives S in the place of the formula, here and in the LLM: it sees the units of each row
    (a group), their values as features, the attention of [CLS] or its stand-in as `cls_row` and
    what `image_key` is made of; how scores add up and how many patches go stays as above.

    With `fast`, patches are hidden from attention instead of taken out: results are the same, and
    as no length depends on numbers then, the encoder and all of its decisions are one captured
    call. At a batch of one, an encoder is bound by launches, not by patches: taking them out saved
    nothing there, and asking how many cost more than the LLM.

    Args:
        llm_cut: whether to cut in the LLM: `"auto"` as published (where an image may be several
            rows or there is no [CLS]), `"on"` or `"off"`. With `"off"`, rows share T by largest
            remainder.
        batch_coupled: True: P is the largest of all images of the call, as in the official code;
            images then depend on their company.
    """

    name: ClassVar[str] = "flowcut"
    summary: ClassVar[str] = "patches leave between encoder blocks by attention, value and size"
    site: ClassVar[Site] = "encoder"
    exactness: ClassVar[Exactness] = "restatement"
    bibtex: ClassVar[str] = """@inproceedings{tong2025flowcut,
  title={FlowCut: Rethinking Redundancy via Information Flow for Efficient Vision-Language Models},
  author={Tong, Jintao and Jin, Wenwei and Qin, Pengda and Li, Anqi and Zou, Yixiong and
          Li, Yuhong and Li, Yuhua and Li, Ruixuan},
  booktitle={Advances in Neural Information Processing Systems},
  year={2025}
}"""

    llm_cut: Literal["auto", "on", "off"] = "auto"
    batch_coupled: bool = False

    def default_scorer(self) -> Scorer:
        """S."""
        return Flow()

    def default_selector(self) -> Selector:
        """The highest."""
        return TopK()

    @property
    def _composed(self) -> bool:
        return True

    @property
    def needs(self) -> tuple[Signal, ...]:
        """Numbers of the pictures, for scorers that draw; all else is in the views."""
        return tuple(signal for signal in super().needs if signal.name == "image_key")

    def check_facts(self, facts: Facts) -> None:
        """A block to cut after, layers that profit from the cut in the LLM, a scorer that fits."""
        scorer = self.active_scorer
        asked = {signal.name for signal in scorer.needs} if scorer else set()
        if unknown := sorted(asked - _GIVEN):
            raise SignalError(
                f"method {self.name!r} got a scorer that needs {unknown[0]!r}, expected one that "
                f"needs none but {', '.join(sorted(_GIVEN))}: nothing else is known between the "
                "blocks of an encoder; choose a method that acts before the LLM"
            )
        if facts.tap < 1:
            raise SignalError(
                f"method {self.name!r} cuts between encoder blocks, expected features read after "
                f"block 1 or later, got block {facts.tap}: choose a later feature layer"
            )
        layer = max(1, facts.first_layer_cut)
        if self._cuts_later(facts.has_cls, facts.tiled) and facts.llm_depth < layer + 2:
            raise SignalError(
                f"method {self.name!r} cuts after decoder layer {layer}, expected an LLM of at "
                f"least {layer + 2} layers, got {facts.llm_depth}: pass llm_cut='off'"
            )

    def encoder_blocks(self, facts: Facts) -> tuple[int, ...]:
        """All before the tap: every block adds to the score."""
        return tuple(range(facts.tap))

    def encoder_cut(self, view: BlockView, budget: Budget) -> Cut:
        """Add this block's score; cut where an even number of blocks remains."""
        attention, tokens = block_tokens(view)
        scores = self._added(view, tokens)
        carry = {} if scores is None else {"score": scores}
        if (view.tap - 1 - view.block) % 2:
            return Cut(None, carry)
        targets = self.targets(view, budget).to(view.valid.device)
        after = self._left(view, attention, targets)
        left, counts = torch.stack([view.valid.sum(-1), after]).cpu()
        keep = None if torch.equal(left, counts) else self._kept(tokens, scores, counts)
        return Cut(keep, carry)

    def mask_refusal(self) -> str | None:
        """Why the device cannot decide alone between encoder blocks; None if it can."""
        if type(self.active_selector) is not TopK:
            return f"selector {self.active_selector.name!r} is told on the host how many go on"
        if self.needs:
            return "the method draws numbers on the host"
        return None

    def encoder_mask(self, view: BlockView, budget: Budget) -> Cut:
        """As `encoder_cut`, over units that are hidden instead of gone; reads nothing."""
        remaining = view.tap - 1 - view.block
        targets, before = None, view.carry.get("score")
        if not remaining % 2:
            targets = constant(self.targets(view, budget), view.valid.device)
        if type(self.active_scorer) is Flow and view.has_cls:
            attends = view.query[:, :, :1], view.key, view.value, view.scale, view.valid
            together = self._together(view)
            scores, keep = flow_step(*attends, before, targets, remaining, together)
        else:
            attention, tokens = block_tokens(view)
            features = tokens.features.masked_fill(~tokens.valid[..., None], 0)
            added = self._added(view, replace(tokens, features=features))
            if added is None:
                return Cut(None, {})
            scores, keep = added, view.valid
            if targets is not None:
                keep = ops.topk_mask(scores, keep, self._left(view, attention, targets))
        if not remaining:  # what was not a number in any block is none now
            check_numbers(self.active_selector.name, scores, view.valid)
        return Cut(None if targets is None else keep, {"score": scores})

    def _added(self, view: BlockView, tokens: Tokens) -> Tensor | None:
        """The cumulative score; None for a selector that looks at none."""
        scores = self._scores(tokens)
        if scores is not None and "score" in view.carry:
            scores = 0.5 * view.carry["score"] + 0.5 * scores
        return scores

    def _scores(self, tokens: Tokens) -> Tensor | None:
        """Scores `[G, N]`, 0 on padding; None for a selector that looks at none."""
        scorer = self.active_scorer
        if scorer is None or not self.active_selector.uses_scores:
            return None
        return scorer(tokens).masked_fill(~tokens.valid, 0)

    def _kept(self, tokens: Tokens, scores: Tensor | None, counts: Tensor) -> Tensor:
        """What the selector chooses, `bool[G, N]`."""
        return mask_over(self.active_selector(tokens, scores, counts), tokens.valid)

    def _left(self, view: BlockView, attention: Tensor, targets: Tensor) -> Tensor:
        """Units of each row after the cut, `int64[R]`."""
        units, remaining = view.valid.sum(-1), view.tap - 1 - view.block
        together = self._together(view)
        return units_left(attention, units, targets, remaining, view.patches, together)

    def _together(self, view: BlockView) -> Tensor | None:
        """Which rows drop as many, `int64[R]` on the device; None: each as many as it would."""
        if max(view.rows, default=1) == 1 and not self.batch_coupled:
            return None
        image = torch.zeros_like(view.image) if self.batch_coupled else view.image
        return constant(image, view.valid.device)

    def targets(self, view: BlockView, budget: Budget) -> Tensor:
        """Units of each row that leave the encoder, `int64[R]` on the CPU."""

        def sharing(image: int) -> Sharing:
            several = view.rows[image] > 1 and not (view.video and view.video[image])
            return roomy_shares if self._cuts_later(view.has_cls, several) else even_shares

        return row_targets(view, budget, sharing)

    def llm_layers(self, facts: Facts, budget: Budget | None = None) -> tuple[int, ...]:
        """Layer index 1, at any depth (official `prune_layer`), or the first that can be."""
        later = self._cuts_later(facts.has_cls, facts.tiled)
        return (max(1, facts.first_layer_cut),) if later else ()

    def layer_cut(self, view: LayerView, budget: Budget) -> Tensor:
        """The tokens of each image that the row's last token looks at, `bool[G, N]`."""
        counts, rows = self.layer_counts(view, budget), view.parent[:, 1]
        over = view.left > counts
        if not over.any():
            return view.valid
        if self._reads_text:
            asks_itself = view.visual[rows, last_entry(view)[rows]]
            require_none(
                asks_itself & constant(over, asks_itself.device),
                InputError(
                    f"method {self.name!r} asks the last token of a prompt what it looks at, "
                    "expected text after the image, got a prompt that ends with it: put text there "
                    "or pass llm_cut='off'"
                ),
            )
        tokens = layer_tokens(view)
        return self._kept(tokens, self._scores(tokens), counts)

    def layer_counts(self, view: LayerView, budget: Budget) -> Tensor:
        """What the budget says of each image, or what is left of it if that is less."""
        wanted = torch.tensor([budget.count(n) for n in view.tokens], dtype=torch.long)
        return torch.minimum(view.left, wanted)

    def capture_refusal(self) -> str | None:
        """As inside the encoder."""
        return self.mask_refusal()

    def published_between(self, facts: Facts) -> Literal["keep", "renumber"]:
        """Official LLaVA code counts anew behind the cut in the LLM, that of Qwen2-VL does not."""
        return "renumber" if facts.has_cls else "keep"

    @property
    def _reads_text(self) -> bool:
        """Whether the scorer looks at what the last token does."""
        scorer = self.active_scorer
        asked = {signal.name for signal in scorer.needs} if scorer else set()
        return self.active_selector.uses_scores and bool(asked & {"flow", "cls_row"})

    def _cuts_later(self, has_cls: bool, several: bool) -> bool:
        """Whether the LLM cuts again, on a model or for an image that may be several rows."""
        return self.llm_cut == "on" or (self.llm_cut == "auto" and (several or not has_cls))
