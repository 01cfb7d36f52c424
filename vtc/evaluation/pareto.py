"""Which budgets of which methods no other one beats in both accuracy and measured time."""

from __future__ import annotations

from collections.abc import Sequence

from vtc.evaluation.compression import FULL
from vtc.evaluation.rows import Row


def share_of_time(row: Row) -> float | None:
    """Time to the first token over the full model's; of the full model that is 1, by definition."""
    if row["ttft_ratio"] is None:
        return None
    return 1.0 if row["method"] == FULL else float(row["ttft_ratio"])


def front(rows: Sequence[Row]) -> list[Row]:
    """The rows that no timed row beats: none is as fast and as accurate, and better in one.

    Args:
        rows: of one model and task, seeds averaged; those that were not timed are left out.

    Returns:
        The fastest first; accuracy rises along it. Of equal rows the first.
    """
    timed = [(share, row) for row in rows if (share := share_of_time(row)) is not None]
    found: list[Row] = []
    for _, row in sorted(timed, key=lambda pair: (pair[0], -pair[1]["accuracy"])):
        if not found or row["accuracy"] > found[-1]["accuracy"]:
            found.append(row)
    return found
