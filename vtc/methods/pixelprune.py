"""PixelPrune: patches whose pixels follow from those before them never enter the encoder."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from vtc.errors import VtcError
from vtc.methods.base import Exactness, Method, Site
from vtc.selectors import Count
from vtc.selectors.predicted import unpredicted_units
from vtc.sites import BlockView, Cut, Facts
from vtc.types import Budget


@dataclass(frozen=True, kw_only=True)
class PixelPrune(Method):
    """PixelPrune (Wang et al., arXiv 2604.00886; official code OPPO-Mente-Lab/PixelPrune, on
    Qwen-VL): predictive coding of pixels.

    The patches of one LLM token (2×2 of them on Qwen) are one cell, of all their pixel values.
    With A the cell to the left, B the one above and C the one above A, a cell is predicted to be B
    where C equals A and not B, else A; the first row knows A alone, the first column B alone. Cells
    that equal their prediction are dropped in front of the first encoder block, and the first cell
    stays. Equal means at most `tau` apart in every value; a dropped cell counts as its prediction
    for those behind it.

    How many stay is up to the picture: documents and screens lose much, photographs at tau = 0
    almost nothing. Frames, crops and tiles are predicted by themselves.

    Ours: any encoder whose patches become LLM tokens of their own; patches keep the positions that
    they have in the whole picture.

    Args:
        tau: τ, in pixel values as the processor gives them (normalized); 0 as published.
    """

    name: ClassVar[str] = "pixelprune"
    summary: ClassVar[str] = "patches whose pixels follow from others never enter the encoder"
    site: ClassVar[Site] = "encoder"
    count: ClassVar[Count] = "adaptive"
    exactness: ClassVar[Exactness] = "restatement"
    published_positions: ClassVar = "keep"
    bibtex: ClassVar[str] = """@article{wang2026pixelprune,
  title={PixelPrune: Pixel-Level Adaptive Visual Token Reduction via Predictive Coding},
  author={Wang, Nan and Jin, Zhiwei and Chen, Chen and Lu, Haonan},
  journal={arXiv preprint arXiv:2604.00886},
  year={2026}
}"""

    tau: float = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        self.expect(self.tau >= 0, "at least 0", "tau")

    def encoder_blocks(self, facts: Facts) -> tuple[int, ...]:
        """In front of the first block."""
        return (-1,)

    def encoder_cut(self, view: BlockView, budget: Budget) -> Cut:
        """Drop what is predicted."""
        if view.pixels is None or view.cells is None:
            raise VtcError(
                f"method {self.name!r} got a view of encoder block {view.block} without pixels, "
                "expected one of what is in front of the first"
            )
        return Cut(unpredicted_units(view.pixels, view.cells, view.valid, self.tau), {})
