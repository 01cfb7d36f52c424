"""What is first, and whether that depends on the budget: in words, with its significance."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import numpy as np
import pandas as pd

from vtc.evaluation.compression import FULL, RANDOM
from vtc.evaluation.findings import name_of, of_what
from vtc.evaluation.printed import chance, interval, percent, points, short
from vtc.evaluation.rows import Row
from vtc.evaluation.scores import DOWNSAMPLE, Scores
from vtc.evaluation.statistics import holm, mcnemar
from vtc.evaluation.table import CurveKey, curves, drops_tokens

LEVEL = 0.05


def best(ranking: Sequence[Row]) -> list[str]:
    """One sentence for each model and task: the largest area, against random and downsample."""
    found = []
    for row in ranking:
        if row["rank"] != 1:
            continue
        together = [r for r in ranking if (r["model"], r["task"]) == (row["model"], row["task"])]
        gaps = [
            f"{points(row[f'vs_{name}'])} points {interval(row, f'vs_{name}')} over {name}, "
            f"{chance(row[f'p_{name}_holm'])} after Holm"
            for name in (RANDOM, DOWNSAMPLE)
            if row[f"vs_{name}"] is not None
        ]
        found.append(
            f"largest area of {len(together)} curves{of_what(ranking, row)}: {name_of(row)} with "
            f"{percent(row['area'], 1)} of the full model's from {percent(row['left'], 1)} of the "
            f"tokens up; {' and '.join(gaps) or 'a baseline itself'}"
        )
    return found


def leaders(summary: Sequence[Row]) -> list[str]:
    """One sentence for each model, task and policy in which no method is first, alone or with
    others, at every budget; by accuracy alone, whatever its significance."""
    found: dict[tuple[str, str, str], dict[str, list[Row]]] = {}
    for rows in _with_budgets(summary).values():
        for row in rows:
            world = row["model"], row["task"], row["positions"]
            found.setdefault(world, {}).setdefault(row["keep"], []).append(row)
    said = []
    for (_, _, positions), budgets in found.items():
        firsts = {keep: _firsts(rows) for keep, rows in budgets.items() if len(rows) > 1}
        labels = [{row["label"] for row in rows} for rows in firsts.values()]
        if labels and not set.intersection(*labels):
            first = next(iter(firsts.values()))
            listed = ", ".join(
                f"{' and '.join(short(row['label']) for row in rows)} at {keep}"
                for keep, rows in firsts.items()
            )
            said.append(
                f"which method is first{of_what(summary, first[0])} depends on the budget "
                f"({positions}): {listed}"
            )
    return said


def _firsts(rows: Sequence[Row]) -> list[Row]:
    """The rows of the highest accuracy; means of as many answers may differ in their last digit."""
    most = max(row["accuracy"] for row in rows)
    return [row for row in rows if row["accuracy"] > most - 1e-9]


def crossings(frame: pd.DataFrame, summary: Sequence[Row]) -> list[str]:
    """One sentence for each two methods of which each beats the other at some budget.

    Both at a level of 0.05, by McNemar's test after Holm's correction for all pairs and budgets of
    the same model, task and positions.
    """
    scores, worlds = Scores(frame), dict[tuple[str, str, str], list[list[Row]]]()
    for curve, rows in _with_budgets(summary).items():
        worlds.setdefault((curve.model, curve.task, curve.positions), []).append(rows)
    return [line for own in worlds.values() for line in _crossed(scores, summary, own)]


def _crossed(scores: Scores, summary: Sequence[Row], own: Sequence[list[Row]]) -> list[str]:
    meetings = [
        (a, b)
        for first, second in itertools.combinations(own, 2)
        for a in first
        for b in second
        if a["keep"] == b["keep"]
    ]
    values = holm(mcnemar(scores.by_seed(a), scores.by_seed(b)) for a, b in meetings)
    pairs: dict[tuple[str, str], list[tuple[Row, Row]]] = {}
    for (a, b), p in zip(meetings, values, strict=True):
        if p is not None and p < LEVEL and a["accuracy"] != b["accuracy"]:
            pairs.setdefault((a["label"], b["label"]), []).append((a, b))
    found = []
    for met in pairs.values():
        gaps = {a["keep"]: a["accuracy"] - b["accuracy"] for a, b in met}
        if len({bool(np.sign(gap) > 0) for gap in gaps.values()}) == 2:
            a, b = met[0]
            listed = ", ".join(f"{points(gap)} points at keep={keep}" for keep, gap in gaps.items())
            found.append(
                f"{name_of(a)} and {name_of(b)}{of_what(summary, a)} change places: {listed}"
            )
    return found


def _with_budgets(summary: Sequence[Row]) -> dict[CurveKey, list[Row]]:
    """The rows of every curve with budgets in tokens, without the full model."""
    return {
        curve: [row for row in rows if row["method"] != FULL]
        for curve, rows in curves(summary).items()
        if drops_tokens(rows) and all(row["keep"] != "adaptive" for row in rows)
    }
