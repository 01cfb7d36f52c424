"""Equally spaced tokens of the raster sequence."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from vtc.methods.base import Method
from vtc.selectors import Selector, UniformStride


@dataclass(frozen=True, kw_only=True)
class Uniform(Method):
    """Baseline: the middles of k equal stretches of the raster sequence."""

    name: ClassVar[str] = "uniform"
    summary: ClassVar[str] = "baseline: equally spaced tokens"
    published_positions: ClassVar = "keep"

    def default_selector(self) -> Selector:
        """Equal strides."""
        return UniformStride()
