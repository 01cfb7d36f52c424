"""Which visual tokens were left, of every question of a cell: bit masks in one small file."""

from __future__ import annotations

import io
import zipfile
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from vtc.errors import InputError
from vtc.types import Selection

Mask = npt.NDArray[np.bool_]


@dataclass(frozen=True, eq=False)
class Left:
    """What was left of a picture, a clip or one of a picture's crops.

    Attributes:
        visual: number of the picture or clip in its question.
        grid: `(t, h, w)` of the tokens; crops that are decided over as one are one row of them.
        kept: `bool[N]`, tokens that stayed as they are.
        covered: `bool[N]`, those and members of merged tokens.
    """

    visual: int
    grid: tuple[int, int, int]
    kept: Mask
    covered: Mask


def left_of(selections: Sequence[Selection], image: int, visual: int) -> list[Left]:
    """What a call left of one of its images.

    Args:
        selections: `handle.remaining`; the last that left any of the image counts.
        image: the image's number in the call.
        visual: its number in the question.
    """
    for selection in reversed(selections):
        groups = (selection.parent[:, 0] == image).nonzero()[:, 0].tolist()
        if not groups:
            return []
        if selection.merge is not None or int(selection.slots[groups].sum()):
            kept, covered = selection.mask().cpu().numpy(), selection.covered().cpu().numpy()
            lengths = selection.lengths
            return [
                Left(visual, selection.grid[g], kept[g, : lengths[g]], covered[g, : lengths[g]])
                for g in groups
            ]
    return []


def packed(samples: Iterable[Sequence[Left]]) -> bytes:
    """The masks of a cell's questions, in the order of its samples, as a `.npz` file."""
    rows = [(i, left) for i, sample in enumerate(samples) for left in sample]
    arrays = {
        "sample": np.array([i for i, _ in rows], np.int32),
        "visual": np.array([left.visual for _, left in rows], np.int16),
        "grid": np.array([left.grid for _, left in rows], np.int32).reshape(-1, 3),
        "length": np.array([len(left.kept) for _, left in rows], np.int32),
        "kept": _bits([left.kept for _, left in rows]),
        "covered": _bits([left.covered for _, left in rows]),
    }
    buffer = io.BytesIO()
    np.savez_compressed(buffer, **arrays)  # type: ignore[arg-type]
    return buffer.getvalue()


def _bits(masks: Sequence[Mask]) -> npt.NDArray[np.uint8]:
    return np.packbits(np.concatenate([*masks, np.zeros(0, bool)]))


class Kept:
    """The masks of a cell's questions, as `Kept.read(out / "cells" / f"{cell}.kept.npz")`."""

    def __init__(self, samples: Sequence[int], left: Sequence[Left]) -> None:
        self._left: dict[int, list[Left]] = {}
        for sample, one in zip(samples, left, strict=True):
            self._left.setdefault(sample, []).append(one)

    def __getitem__(self, sample: int) -> list[Left]:
        """What was left of each picture of a question, by its line in the samples file."""
        return self._left.get(sample, [])

    @classmethod
    def read(cls, source: Path | bytes) -> Kept:
        """Read a file, or its content.

        Raises:
            InputError: it is not such a file, or damaged.
        """
        try:
            with np.load(io.BytesIO(source) if isinstance(source, bytes) else source) as found:
                part: dict[str, Any] = {name: found[name] for name in found.files}
            ends = part["length"].cumsum()
            masks = [
                np.split(np.unpackbits(part[name], count=ends[-1] if len(ends) else 0), ends[:-1])
                for name in ("kept", "covered")
            ]
            visuals, grids = part["visual"].tolist(), [tuple(row) for row in part["grid"].tolist()]
            samples = part["sample"].tolist()
        except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
            raise InputError(
                f"{'these masks' if isinstance(source, bytes) else source} cannot be read "
                f"({error}), expected the .kept.npz file of a cell; run the sweep again"
            ) from None
        rows = zip(visuals, grids, *masks, strict=False)
        return cls(
            samples, [Left(v, grid, k.astype(bool), c.astype(bool)) for v, grid, k, c in rows]
        )
