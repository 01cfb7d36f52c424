"""What the numbers say in words: where a simple baseline wins, which curve is not monotone."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import pandas as pd

from vtc.evaluation.compression import FULL, RANDOM, controls
from vtc.evaluation.printed import percent, points, short
from vtc.evaluation.statistics import Interval, difference_interval
from vtc.evaluation.table import CURVE, CurveKey, Row, control, curves, drops_tokens, pick, scores

SIMPLE = ("random", "downsample")


def losses(frame: pd.DataFrame, summary: Sequence[Row]) -> list[str]:
    """One sentence for every curve that something simpler scores higher than somewhere.

    Against random tokens and a smaller picture at the same keep. Methods that skip work or decide
    by themselves have no such keep: against the same method choosing at random, and against random
    tokens and smaller pictures of at most as many active tokens, averaged over decoder layers.
    """
    found: dict[str, list[str]] = {}
    for row in summary:
        if row["method"] == FULL:
            continue
        for other, where in _rivals(summary, row):
            gap = _difference(frame, other, row)
            if gap.value > 0:
                pair = f"{_name(other)} scores higher than {_name(row)}{_of(summary, row)}"
                found.setdefault(pair, []).append(f"{_gap(gap)} at {where}")
    return [f"{pair}: {'; '.join(gaps)}" for pair, gaps in found.items()]


def bends(frame: pd.DataFrame, summary: Sequence[Row]) -> list[str]:
    """One sentence for every step to fewer tokens at which accuracy rises beyond its interval.

    Of a method that keeps all tokens, to fewer active ones, averaged over decoder layers.
    """
    kept = [rows for rows in curves(summary).values() if drops_tokens(rows)]
    active = curves(summary, "active_fraction").values()
    skipping = [rows for rows in active if not drops_tokens(rows)]
    found = []
    for share, words, all_rows in (
        ("kept_fraction", "of the tokens", kept),
        ("active_fraction", "active tokens", skipping),
    ):
        for more, fewer in (pair for rows in all_rows for pair in itertools.pairwise(rows)):
            gap = _difference(frame, fewer, more)
            if gap.low > 0 and fewer[share] < more[share]:
                found.append(
                    f"{_name(fewer)}{_of(summary, fewer)} rises from {percent(more[share], 1)} to "
                    f"{percent(fewer[share], 1)} {words}: {_gap(gap)}"
                )
    return found


def _rivals(summary: Sequence[Row], row: Row) -> list[tuple[Row, str]]:
    """What is simpler than a row, and the words for where they meet."""
    counted = controls(row["method"], row["options"]) == (RANDOM,)
    at_keep = f"keep={row['keep']}"
    found = [] if (random := control(summary, row)) is None else [(random, at_keep)]
    for simple in SIMPLE:
        if counted and simple != RANDOM and row["label"] != simple:
            found += [(other, at_keep) for other in _same_keep(summary, row, simple)]
        if not counted:
            found += [
                (
                    other,
                    f"{percent(other['active_fraction'], 1)} active tokens against "
                    f"{percent(row['active_fraction'], 1)}",
                )
                for other in _as_few(summary, row, simple)
            ]
    return found


def _same_keep(summary: Sequence[Row], row: Row, method: str) -> list[Row]:
    """The baseline at the same keep; under the same positions where it was run under them."""
    key = (row["model"], row["task"], method, row["keep"])
    same = [r for r in summary if (r["model"], r["task"], r["label"], r["keep"]) == key]
    return [r for r in same if r["positions"] == row["positions"]][:1] or same[:1]


def _as_few(summary: Sequence[Row], row: Row, method: str) -> list[Row]:
    """The baseline at the most active tokens that are no more than the row's."""
    fewer = [
        r
        for r in summary
        if CurveKey(*(r[name] for name in CURVE))
        == CurveKey(row["model"], row["task"], method, row["positions"])
        # shares of other counts may differ in their last digit
        and r["active_fraction"] <= row["active_fraction"] + 1e-6
    ]
    return sorted(fewer, key=lambda r: -r["active_fraction"])[:1]


def _difference(frame: pd.DataFrame, a: Row, b: Row) -> Interval:
    first = scores(pick(frame, a))
    second = scores(pick(frame, b)).reindex(first.index)
    return difference_interval(first.to_numpy(float), second.to_numpy(float))


def _name(row: Row) -> str:
    seeds = f", mean of {row['seeds']} seeds" if row["seeds"] > 1 else ""
    return f"{short(row['label'])} ({row['positions']}{seeds})"


def _of(summary: Sequence[Row], row: Row) -> str:
    """The task, where there are several."""
    return f" in {row['task']}" if len({other["task"] for other in summary}) > 1 else ""


def _gap(gap: Interval) -> str:
    verdict = "" if gap.excludes_zero else ", within its interval"
    return f"{points(gap.value)} points [{points(gap.low)}, {points(gap.high)}]{verdict}"
