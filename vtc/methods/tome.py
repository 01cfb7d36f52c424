"""ToMe: similar patches of the encoder become one, block by block."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from vtc.errors import SignalError
from vtc.mergers import merged_pairs
from vtc.methods.base import Exactness, Method, Site
from vtc.selectors.shares import row_targets
from vtc.sites import BlockView, Cut, Facts
from vtc.types import Budget


@dataclass(frozen=True, kw_only=True)
class ToMe(Method):
    """ToMe (Bolya et al., ICLR 2023, arXiv 2210.09461), in the vision encoder of a multimodal LLM.
    Written from a description of the method.

    Behind each block up to the last one whose work is still read (tap − 1), r patches of a row are
    merged: with their keys averaged over heads, every other patch finds the most similar (cosine)
    of those between; the r most similar pairs become one, the mean weighed by how many patches
    each stands for (s), at the place of the latter. Later blocks add log(s) to attention on it
    (`proportional`). [CLS] is left alone. r is nearly the same in all blocks, so that T are left of
    a row behind the last cut; where that would be more than half, the rest is matched again in the
    same block.

    Ours: patches that become one LLM token together are one unit, whose keys are averaged and whose
    patches are merged one by one; keys have the encoder's positions applied where it rotates them;
    the merge is behind a block, in the original between its attention and its MLP. What is left
    stands at the place of the patch merged into. Crops and frames of an image share T evenly and
    do not see each other. `keep` counts LLM tokens.

    Args:
        proportional: whether log(s) is added to attention, as published.
    """

    name: ClassVar[str] = "tome"
    summary: ClassVar[str] = "similar patches become one, block by block of the encoder"
    site: ClassVar[Site] = "encoder"
    exactness: ClassVar[Exactness] = "restatement"
    bibtex: ClassVar[str] = """@inproceedings{bolya2023token,
  title={Token Merging: Your ViT But Faster},
  author={Bolya, Daniel and Fu, Cheng-Yang and Dai, Xiaoliang and Zhang, Peizhao and
          Feichtenhofer, Christoph and Hoffman, Judy},
  booktitle={International Conference on Learning Representations},
  year={2023}
}"""

    proportional: bool = True

    def check_facts(self, facts: Facts) -> None:
        """A block to merge behind."""
        if facts.tap < 1:
            raise SignalError(
                f"method {self.name!r} merges between encoder blocks, expected features read after "
                f"block 1 or later, got block {facts.tap}: choose a later feature layer"
            )

    def encoder_blocks(self, facts: Facts) -> tuple[int, ...]:
        """All before the tap."""
        return tuple(range(facts.tap))

    def encoder_cut(self, view: BlockView, budget: Budget) -> Cut:
        """Merge so many pairs that the same number in each block to come leaves T."""
        size = view.carry.get("size", torch.ones(view.valid.shape, device=view.valid.device))
        left, targets = view.units, row_targets(view, budget)
        for block in range(view.block + 1):  # what earlier blocks left, without asking the device
            left = left - (amount := _amount(left, targets, view.tap - block))
        if not bool(amount.any()):
            return Cut(None, {"size": size})
        keys = view.key[:, :, int(view.has_cls) :].float().mean(1)  # [R, U·m, d]
        metric = keys.unflatten(1, (view.valid.shape[1], view.patches)).mean(2)
        keep, into, weight, grown = merged_pairs(metric, view.valid, amount, size, left + amount)
        return Cut(keep, {"size": grown}, into, weight, grown if self.proportional else None)


def _amount(left: Tensor, targets: Tensor, cuts: int) -> Tensor:
    """Pairs of each row to merge now, as many in each of so many cuts, rounded up."""
    return -((targets - left).clamp_max(0) // cuts)
