"""Scores of all cells of a sweep by what a cell is: who is compared with whom.

Every cell of a model and task holds the same questions, so arrays of two cells are pairs.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
import pandas as pd

from vtc.errors import VtcError
from vtc.evaluation.compression import FULL, RANDOM, controls
from vtc.evaluation.statistics import Floats

DOWNSAMPLE = "downsample"


class Key(NamedTuple):
    """A cell, all its seeds together."""

    model: str
    task: str
    label: str
    positions: str
    keep: str


class Scores:
    """Scores by cell, seed and question, in the order of the questions' numbers.

    Args:
        frame: from `table.samples_frame`.

    Raises:
        VtcError: two cells of a model and task hold different questions.
    """

    def __init__(self, frame: pd.DataFrame) -> None:
        self._cells: dict[Key, dict[int, Floats]] = {}
        asked: dict[tuple[str, str], tuple[Key, list[Any]]] = {}
        for names, part in frame.groupby([*Key._fields, "seed"], sort=False):
            *head, seed = map(str, names)
            key, part = Key(*head), part.sort_values("doc_id", kind="stable")
            questions = part["doc_id"].tolist()
            first, expected = asked.setdefault((key.model, key.task), (key, questions))
            if questions != expected:
                raise VtcError(
                    f"{key.label} at keep={key.keep} answered {len(questions)} questions of "
                    f"{key.task}, expected the {len(expected)} that {first.label} at "
                    f"keep={first.keep} answered; run the sweep again into an empty folder"
                )
            self._cells.setdefault(key, {})[int(seed)] = part["score"].to_numpy(float)

    def by_seed(self, of: Mapping[str, Any]) -> list[Floats]:
        """The scores of a row, one array `[questions]` per seed; of one seed where it is one's."""
        found = self._cells[key_of(of)]
        return list(found.values()) if of.get("seed") is None else [found[of["seed"]]]

    def mean(self, of: Mapping[str, Any]) -> Floats:
        """The same averaged over seeds, `[questions]`."""
        found: Floats = np.mean(self.by_seed(of), axis=0)
        return found

    def full(self, of: Mapping[str, Any]) -> dict[str, Any] | None:
        """The full model on the row's questions."""
        return self._first(of, lambda key: key.label == FULL)

    def random(self, of: Mapping[str, Any]) -> dict[str, Any] | None:
        """What chooses at random what the row chooses, at the same keep and positions."""
        for label in controls(of["method"], of["options"]):
            if label == of["label"]:
                return None
            same = key_of(of)._replace(label=label)
            if same in self._cells:
                return same._asdict()
        return None

    def downsample(self, of: Mapping[str, Any]) -> dict[str, Any] | None:
        """A smaller picture at the same keep; under the row's positions if it was run under them.

        None for methods whose keep is not a share of the tokens: they have no such picture.
        """
        counted = controls(of["method"], of["options"]) == (RANDOM,)
        if not counted or of["label"] in (FULL, DOWNSAMPLE):
            return None
        return self._first(of, lambda key: key.label == DOWNSAMPLE and key.keep == of["keep"])

    def original_ids(self, of: Mapping[str, Any]) -> dict[str, Any] | None:
        """The same method, keep and seeds with original position ids, if the row has others."""
        same = key_of(of)._replace(positions="keep")
        if of["positions"] == "keep" or same not in self._cells:
            return None
        there = self._cells[same].keys() >= set(_seeds(of, self._cells[key_of(of)]))
        return {**same._asdict(), "seed": of.get("seed")} if there else None

    def _first(self, of: Mapping[str, Any], wanted: Any) -> dict[str, Any] | None:
        """The first cell of the row's model and task that is wanted, its positions preferred."""
        found = [
            key
            for key in self._cells
            if (key.model, key.task) == (of["model"], of["task"]) and wanted(key)
        ]
        same = [key for key in found if key.positions == of["positions"]]
        return next((key._asdict() for key in (*same, *found)), None)


def key_of(row: Mapping[str, Any]) -> Key:
    """The cell of a row."""
    return Key(*(row[name] for name in Key._fields))


def _seeds(of: Mapping[str, Any], cell: Mapping[int, Floats]) -> list[int]:
    return list(cell) if of.get("seed") is None else [of["seed"]]
