"""What the numbers say in words: where a simple baseline wins, which curve is not monotone."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

import pandas as pd

from vtc.evaluation.compression import FULL, RANDOM, controls
from vtc.evaluation.printed import chance, percent, points, short
from vtc.evaluation.rows import Row
from vtc.evaluation.scores import DOWNSAMPLE, Scores
from vtc.evaluation.statistics import Interval, difference_interval
from vtc.evaluation.table import CURVE, CurveKey, control, curves, drops_tokens

SIMPLE = (RANDOM, DOWNSAMPLE)


def losses(frame: pd.DataFrame, summary: Sequence[Row]) -> list[str]:
    """One sentence for every curve that something simpler scores higher than somewhere.

    Against random tokens and a smaller picture at the same keep, with the p-value after Holm's
    correction that the row has. Methods that skip work or decide by themselves have no such keep:
    against the same method choosing at random, and, by the interval alone, against random tokens
    and smaller pictures of at most as many active tokens, averaged over decoder layers.
    """
    found: dict[str, list[str]] = {}
    scores = Scores(frame)
    for row in summary:
        if row["method"] == FULL:
            continue
        for other, where, tested in _rivals(summary, row):
            gap = _difference(scores, other, row)
            if gap.value > 0:
                pair = f"{name_of(other)} scores higher than {name_of(row)}{of_what(summary, row)}"
                said = _gap(gap, row[tested] if tested else None)
                found.setdefault(pair, []).append(f"{said} at {where}")
    return [f"{pair}: {'; '.join(gaps)}" for pair, gaps in found.items()]


def bends(frame: pd.DataFrame, summary: Sequence[Row]) -> list[str]:
    """One sentence for every step to fewer tokens at which accuracy rises beyond its interval.

    Of a method that keeps all tokens, to fewer active ones, averaged over decoder layers.
    """
    kept = [rows for rows in curves(summary).values() if drops_tokens(rows)]
    active = curves(summary, "active_fraction").values()
    skipping = [rows for rows in active if not drops_tokens(rows)]
    found, scores = [], Scores(frame)
    for share, words, all_rows in (
        ("kept_fraction", "of the tokens", kept),
        ("active_fraction", "active tokens", skipping),
    ):
        for more, fewer in (pair for rows in all_rows for pair in itertools.pairwise(rows)):
            gap = _difference(scores, fewer, more)
            if gap.low > 0 and fewer[share] < more[share]:
                found.append(
                    f"{name_of(fewer)}{of_what(summary, fewer)} rises from "
                    f"{percent(more[share], 1)} to {percent(fewer[share], 1)} {words}: {_gap(gap)}"
                )
    return found


def _rivals(summary: Sequence[Row], row: Row) -> list[tuple[Row, str, str | None]]:
    """What is simpler than a row, the words for where they meet, and the column with the p-value
    that the two differ."""
    counted = controls(row["method"], row["options"]) == (RANDOM,)
    at_keep = f"keep={row['keep']}"
    random = control(summary, row)
    found = [] if random is None else [(random, at_keep, _tested(row, random, RANDOM))]
    if counted and row["label"] != DOWNSAMPLE:
        found += [
            (other, at_keep, _tested(row, other, DOWNSAMPLE))
            for other in _same_keep(summary, row, DOWNSAMPLE)
        ]
    if not counted:
        found += [
            (
                other,
                f"{percent(other['active_fraction'], 1)} active tokens against "
                f"{percent(row['active_fraction'], 1)}",
                None,
            )
            for simple in SIMPLE
            for other in _as_few(summary, row, simple)
        ]
    return found


def _tested(row: Row, other: Row, name: str) -> str | None:
    """The column of the test against `other`: random rows are tested under the same positions."""
    same = name == DOWNSAMPLE or other["positions"] == row["positions"]
    return f"p_{name}_holm" if same else None


def _same_keep(summary: Sequence[Row], row: Row, label: str) -> list[Row]:
    """The baseline at the same keep; under the same positions where it was run under them."""
    key = (row["model"], row["task"], label, row["keep"])
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


def _difference(scores: Scores, a: Row, b: Row) -> Interval:
    return difference_interval(scores.mean(a), scores.mean(b))


def name_of(row: Row) -> str:
    """A row's method, positions and seeds."""
    seeds = f", mean of {row['seeds']} seeds" if row["seeds"] > 1 else ""
    return f"{short(row['label'])} ({row['positions']}{seeds})"


def of_what(summary: Sequence[Row], row: Row) -> str:
    """The task and the model, where there are several."""
    task = f" in {row['task']}" if len({other["task"] for other in summary}) > 1 else ""
    return task + (f" of {row['model']}" if len({r["model"] for r in summary}) > 1 else "")


def _gap(gap: Interval, p: float | None = None) -> str:
    none = math.isnan(gap.low)
    ends = "n/a" if none else f"{points(gap.low)}, {points(gap.high)}"
    said = f"{points(gap.value)} points [{ends}]"
    if p is not None or none:
        return said if p is None else f"{said}, {chance(p)} after Holm"
    return said if gap.excludes_zero else f"{said}, within its interval"
