"""Questions that the full model answers and a method does not: what pruning itself breaks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import pandas as pd

from vtc.evaluation.cells import BASELINES
from vtc.evaluation.compression import FULL
from vtc.evaluation.printed import name
from vtc.evaluation.rows import Row
from vtc.evaluation.statistics import RIGHT
from vtc.evaluation.table import GROUP

# the baselines whose failures are shown too, behind those of methods
_SHOWN_BASELINES = ("random", "downsample")
_PER_METHOD = 3


@dataclass(frozen=True)
class Failure:
    """One question that a method breaks.

    Attributes:
        row: the method at its budget.
        sample: its sample of the question, as `samples_frame` has it.
        full_answer: what the full model said.
        also: the other budgets of the method at which the answer is wrong too.
        answered_by: the methods that answer it at the same budget.
    """

    row: Row
    sample: dict[str, Any]
    full_answer: str
    also: list[str]
    answered_by: list[str]


def failures(
    frame: pd.DataFrame, rows: Sequence[Row], shown: Sequence[Row], limit: int
) -> list[Failure]:
    """The most telling failures: those with the least evidence left first.

    Each method takes a part of them, of different kinds and, where there are others, of questions
    that no earlier method stands for.

    Args:
        frame: samples of one model and task, of questions that can be shown.
        rows: of the same, seeds averaged.
        shown: one row for each method whose failures are wanted.
        limit: how many at most.
    """
    wanted = [row for row in shown if row["label"] not in (FULL, *BASELINES)]
    wanted += [row for row in shown if row["label"] in _SHOWN_BASELINES]
    each = min(_PER_METHOD, -(-limit // max(1, len(wanted))))
    answers = _Answers(frame)
    taken: set[int] = set()
    found: list[Failure] = []
    for row in wanted:
        for sample in answers.broken(row, taken)[:each]:
            doc = int(sample["doc_id"])
            taken.add(doc)
            others = [r for r in shown if r["label"] not in (FULL, row["label"])]
            found.append(
                Failure(
                    row,
                    sample,
                    answers.full[doc],
                    [
                        r["keep"]
                        for r in rows
                        if _is_other_budget(r, row) and not answers.right(r, doc)
                    ],
                    [name(r) for r in others if answers.right(r, doc)],
                )
            )
    return found[:limit]


class _Answers:
    """What was answered by whom; of several seeds, by the first."""

    def __init__(self, frame: pd.DataFrame) -> None:
        firsts = frame.drop_duplicates([*GROUP, "doc_id"])
        self._cells = dict(iter(firsts.groupby(GROUP, sort=False)))
        right = firsts[firsts["score"] >= RIGHT]
        self._right = right.groupby(GROUP, sort=False)["doc_id"].agg(set).to_dict()
        full = right[right["label"] == FULL]
        #: the full model's right answers by question
        self.full = dict(zip(full["doc_id"], full["answer"].astype(str).str.strip(), strict=True))

    def right(self, row: Row, doc: int) -> bool:
        """Whether a row's method answers a question."""
        return doc in self._right.get(_key(row), ())

    def broken(self, row: Row, taken: set[int]) -> list[dict[Any, Any]]:
        """What a row's method breaks, one of each kind first, and of these the least evidence."""
        own = self._cells[_key(row)]
        lost = own[(own["score"] < RIGHT) & own["doc_id"].isin(self.full)]
        order = ["again", "evidence_recall", "doc_id"]
        lost = lost.assign(again=lost["doc_id"].isin(taken)).sort_values(order)
        lost = lost.assign(turn=lost.groupby("kind", dropna=False).cumcount())
        return lost.sort_values(["turn", *order]).to_dict("records")


def _key(row: Row) -> tuple[Any, ...]:
    return tuple(row[column] for column in GROUP)


def _is_other_budget(row: Row, of: Row) -> bool:
    return _key(row)[:-1] == _key(of)[:-1] and row["keep"] != of["keep"]
