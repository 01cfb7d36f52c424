"""What is not kept becomes a few tokens behind the kept ones (VisionZip)."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn.functional import pad

from vtc import ops
from vtc.dispatch import constant
from vtc.errors import OptionError, SignalError
from vtc.mergers.nearest import means, nearest
from vtc.selectors.base import Selector, checked_scores, selection_of
from vtc.sites import Facts
from vtc.types import CLS_FEATURES, Selection, Signal, Tokens, round_half_up

_FEATURES = Signal("encoder_features", ends_at_tap=True)
_CLS = Signal(CLS_FEATURES, ends_at_tap=True)


@dataclass(frozen=True)
class Contextual(Selector):
    """Of T slots, c = round(T·share) are contextual and the others dominant: the highest scores,
    and the [CLS] where it is sent.

    Of the n tokens left, those at ranks 0, s, 2s, ..., s = max(1, ⌊n/c⌋), are c targets; each other
    one belongs to the target of highest cosine. A contextual token is its target plus the mean of
    those that belong to it; it stands behind the dominant ones.

    Args:
        share: of contextual slots.
        cls: whether a [CLS] is the first dominant one; None: where the model can take it.
        metric: the signal whose vectors are compared.
    """

    name: ClassVar[str] = "contextual"
    share: float = 10 / 64
    cls: bool | None = None
    metric: Signal = Signal("mean_keys", ends_at_tap=True)

    def __post_init__(self) -> None:
        if not 0 <= self.share < 1:
            raise OptionError(f"contextual got share={self.share}, expected one in [0, 1)")

    @property
    def needs(self) -> tuple[Signal, ...]:
        """What is compared and what is summed."""
        return (self.metric, _FEATURES, *((_CLS,) if self.cls else ()))

    def on(self, facts: Facts) -> Contextual:
        """With [CLS] where the model can take it; raises `SignalError` if it has to and cannot."""
        can = facts.has_cls and facts.projects and not facts.tiled
        if self.cls and not can:
            raise SignalError(
                f"{self.name} got cls=True, expected a model whose images are one crop of an "
                "encoder with [CLS] and whose projector takes it, such as LLaVA-1.5: leave cls out"
            )
        return self if self.cls is not None else replace(self, cls=can)

    def __call__(self, tokens: Tokens, scores: Tensor | None, counts: Tensor) -> Selection:
        """Choose and merge; raises `VtcError` on missing or NaN scores."""
        scores, valid = checked_scores(self.name, tokens, scores), tokens.valid
        behind = torch.tensor([round_half_up(t * self.share) for t in counts.tolist()]).long()
        behind = behind.minimum(counts - int(bool(self.cls)))
        dominant = counts - behind - int(bool(self.cls))
        keep, keep_valid = ops.group_topk(scores, valid, dominant)
        rest = valid & ~ops.topk_mask(scores, valid, constant(dominant, valid.device))
        target, rank = self._targets(tokens, rest, behind, dominant)
        first, n = keep.shape[1], valid.shape[1]
        # each token of the rest by the rank of the target that it belongs to
        place = torch.arange(n, device=valid.device).expand_as(valid)
        owner = place.where(target, nearest(tokens.signal(self.metric.key), valid, target))
        owner = rank.gather(1, owner)
        width = int(behind.max()) if len(behind) else 0
        weight = means(owner, rest & ~target, width).masked_fill(target, 1)
        behind = constant(behind, valid.device)
        weight = weight.masked_fill((behind == 0)[:, None], 0)
        slots = torch.full((len(valid), width + 1), -1, device=valid.device)
        slots = slots.scatter(1, rank.masked_fill(~target, width), place)[:, :width]
        positions = torch.cat([keep.masked_fill(~keep_valid, -1), slots], 1)
        slot = (first + owner).masked_fill(weight == 0, 0)
        chosen = replace(
            selection_of(tokens, keep, keep_valid, scores), positions=positions, merged="encoder"
        )
        if self.cls:
            chosen, slot = _with_cls(chosen), (slot + 1).masked_fill(weight == 0, 0)
        return replace(chosen, merge=(slot, place.masked_fill(weight == 0, 0), weight))

    def _targets(
        self, tokens: Tokens, rest: Tensor, behind: Tensor, dominant: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Which tokens of the rest are targets, `bool[G, N]`, and the rank of each as one."""
        left = torch.tensor(tokens.lengths) - dominant
        step = constant((left // behind.clamp_min(1)).clamp_min(1), rest.device)[:, None]
        rank = rest.long().cumsum(1) - 1
        most = constant(behind, rest.device)[:, None]
        return rest & (rank % step == 0) & (rank // step < most), rank.clamp_min(0) // step


def _with_cls(selection: Selection) -> Selection:
    """The same with a [CLS] in front, at the position of the first token."""
    return replace(
        selection,
        keep=pad(selection.keep, (1, 0), value=-1),
        valid=pad(selection.valid, (1, 0), value=True),
        positions=pad(selection.slot_positions, (1, 0), value=0),
        sends_cls=True,
    )
