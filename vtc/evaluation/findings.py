"""What the numbers say in words: where a simple baseline wins, which curve is not monotone."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import pandas as pd

from vtc.evaluation.printed import percent, points
from vtc.evaluation.statistics import Interval, difference_interval
from vtc.evaluation.table import FULL, Row, curves, pick, scores

SIMPLE = ("random", "downsample")


def losses(frame: pd.DataFrame, summary: Sequence[Row]) -> list[str]:
    """One sentence for every curve that `random` or `downsample` scores higher than somewhere."""
    found: dict[str, list[str]] = {}
    for row in summary:
        for simple in SIMPLE:
            other = _same_keep(summary, row, simple)
            if other is None or row["method"] in (FULL, simple):
                continue
            gap = _difference(frame, other, row)
            if gap.value > 0:
                pair = f"{_name(other)} scores higher than {_name(row)}{_of(summary, row)}"
                found.setdefault(pair, []).append(f"{_gap(gap)} at keep={row['keep']}")
    return [f"{pair}: {'; '.join(gaps)}" for pair, gaps in found.items()]


def bends(frame: pd.DataFrame, summary: Sequence[Row]) -> list[str]:
    """One sentence for every step to fewer tokens at which accuracy rises beyond its interval."""
    found = []
    for rows in curves(summary).values():
        for more, fewer in itertools.pairwise(rows):
            gap = _difference(frame, fewer, more)
            if gap.low > 0:
                found.append(
                    f"{_name(fewer)}{_of(summary, fewer)} rises from "
                    f"{percent(more['kept_fraction'], 1)} to "
                    f"{percent(fewer['kept_fraction'], 1)} of the tokens: {_gap(gap)}"
                )
    return found


def _same_keep(summary: Sequence[Row], row: Row, method: str) -> Row | None:
    """The baseline at the same keep; under the same positions where it was run under them."""
    same = [
        r
        for r in summary
        if (r["task"], r["label"], r["keep"]) == (row["task"], method, row["keep"])
    ]
    return next((r for r in same if r["positions"] == row["positions"]), same[0] if same else None)


def _difference(frame: pd.DataFrame, a: Row, b: Row) -> Interval:
    first = scores(pick(frame, a))
    second = scores(pick(frame, b)).reindex(first.index)
    return difference_interval(first.to_numpy(float), second.to_numpy(float))


def _name(row: Row) -> str:
    seeds = f", mean of {row['seeds']} seeds" if row["seeds"] > 1 else ""
    return f"{row['label']} ({row['positions']}{seeds})"


def _of(summary: Sequence[Row], row: Row) -> str:
    """The task, where there are several."""
    return f" in {row['task']}" if len({other["task"] for other in summary}) > 1 else ""


def _gap(gap: Interval) -> str:
    verdict = "" if gap.excludes_zero else ", within its interval"
    return f"{points(gap.value)} points [{points(gap.low)}, {points(gap.high)}]{verdict}"
