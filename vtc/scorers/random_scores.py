"""Scores drawn at random, the same for the same picture wherever it stands in a batch."""

from __future__ import annotations

import zlib
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from vtc.scorers.base import Scorer
from vtc.types import Signal, Tokens


@dataclass(frozen=True)
class RandomScores(Scorer):
    """Uniform scores from a generator seeded by the call's seed and the pixels of the image."""

    name: ClassVar[str] = "random"

    @property
    def needs(self) -> tuple[Signal, ...]:
        """A number made from each image's pixels."""
        return (Signal("image_key"),)

    def __call__(self, tokens: Tokens) -> Tensor:
        """Scores `float32[G, N]`; those of a group depend on its own length and key alone, and
        behind an earlier cut each token has the number that it had before."""
        keys = tokens.signal("image_key").tolist()
        scores = torch.zeros(tokens.valid.shape)
        for g, (key, n) in enumerate(zip(keys, tokens.lengths, strict=True)):
            # hashed, because torch's CPU generator looks at the lowest 32 bits of a seed alone
            mixed = zlib.crc32(f"{tokens.seed} {key}".encode())
            generator = torch.Generator().manual_seed(mixed)
            there = tokens.valid[g].cpu()
            if tokens.index is None or not n:
                scores[g, there] = torch.rand(n, generator=generator)
            else:
                index = tokens.index[g].cpu()[there]
                # a longer draw begins with the numbers of a shorter one
                scores[g, there] = torch.rand(int(index.max()) + 1, generator=generator)[index]
        return scores.to(tokens.valid.device)
