"""A smaller picture: the baseline that beats many pruners, because it also spares the encoder."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from vtc.methods.base import Exactness, Method, Site
from vtc.selectors import GridPool, Selector
from vtc.selectors.grid_pool import largest_grid


@dataclass(frozen=True, kw_only=True)
class Downsample(Method):
    """Baseline: the image itself, resized before the encoder to the largest token grid within the
    budget.

    The stock tower sees the smaller image with interpolated position embeddings; its tokens sit at
    the centers of the original cells that they cover. The aspect is kept, so the number of tokens
    is at most the budget. Of an image of several crops, the thumbnail is what is resized; all
    frames of a video stay, each smaller and none pooled. See VTC-Bench (arXiv 2510.07143) for why
    every report needs this row.
    """

    name: ClassVar[str] = "downsample"
    summary: ClassVar[str] = "baseline: the picture itself made smaller before the encoder"
    site: ClassVar[Site] = "pixels"
    count: ClassVar = "at_most"
    exactness: ClassVar[Exactness] = "restatement"
    published_positions: ClassVar = "renumber"

    def default_selector(self) -> Selector:
        """The coarser grid that the smaller image has."""
        return GridPool(overview=True)

    def size(self, grid: tuple[int, int, int], slots: int) -> tuple[int, int]:
        """The token grid (h, w) that each frame of an image of `grid` is resized to when `slots`
        tokens were chosen."""
        return largest_grid(grid[1], grid[2], slots // grid[0])
