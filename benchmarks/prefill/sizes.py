"""The stock models of this benchmark, and the points at which they are measured."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor

from vtc.bench.families import SHAPES, Llava
from vtc.bench.families import tiny as tiny_shape


@dataclass(frozen=True)
class Size(Llava):
    """A LLaVA and its prompt: text, one image, text.

    Attributes:
        batches: numbers of prompts to measure.
        skips: numbers of decoder layers that visual rows skip.
        keeps: shares of tokens that token dropping leaves.
    """

    batches: tuple[int, ...] = (1,)
    skips: tuple[int, ...] = (0, 4, 8, 12, 16, 19, 24, 28)
    # the fractions of the testbed's sweeps, and one between the first of them and all
    keeps: tuple[float, ...] = (0.75, 0.5, 0.33, 0.22, 0.11, 0.055)

    def places(self) -> tuple[Tensor, list[tuple[int, int, int]]]:
        """Columns of the visual tokens, `int64[N]`; of newline tokens the column and the range of
        visual tokens that are its row."""
        start, base, row = self.text[0], self.cells**2, 2 * self.cells
        columns, ends = list(range(start, start + base)), []
        for i in range(self.newlines):
            first = start + base + i * (row + 1)
            columns += range(first, first + row)
            ends.append((first + row, base + i * row, base + (i + 1) * row))
        return torch.tensor(columns), ends


def _of(name: str, **points: Any) -> Size:
    shape = SHAPES[name]
    return Size(**{f.name: getattr(shape, f.name) for f in fields(shape)}, **points)


SIZES = {
    "llava-1.5-7b": _of("llava-1.5-7b", batches=(1, 8)),
    "llava-next-7b": _of("llava-next-7b"),
}


def fewer(size: Size) -> Size:
    """Fewer points, for several prompts at once: a call takes several times as long."""
    return replace(size, skips=(0, 8, 16, 24, 28), keeps=(0.5, 0.22, 0.11))


def tiny(size: Size) -> Size:
    """The same on a scale for a CPU."""
    batches = size.batches[:1] if size.crops > 1 else (1, 2)
    small: Size = tiny_shape(size)
    return replace(small, batches=batches, skips=(0, 2), keeps=(0.75, 0.22))
