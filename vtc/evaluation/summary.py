"""What a report says first: how many tokens can go, and where simple baselines win."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from vtc.evaluation.cells import BASELINES
from vtc.evaluation.compression import FULL, RANDOM
from vtc.evaluation.heatmap import rows_at
from vtc.evaluation.pictures import KEEP
from vtc.evaluation.printed import name, percent, points
from vtc.evaluation.rows import Row

DOWNSAMPLE = "downsample"
_WORDS = {RANDOM: "A random choice", DOWNSAMPLE: "A smaller picture"}


@dataclass(frozen=True)
class Verdict:
    """A simple baseline, and the methods it beats.

    Attributes:
        baseline: in words.
        beaten: methods that score lower than it at some budget, each with the worst of them.
        clearly: those of them whose paired interval excludes zero there.
        tried: how many methods were compared with it.
    """

    baseline: str
    beaten: list[str]
    clearly: list[str]
    tried: int


def verdicts(rows: Sequence[Row]) -> list[Verdict]:
    """What a random choice, of tokens or of layers, and a smaller picture beat at the same keep,
    and how clearly.

    Args:
        rows: of one model and task, seeds averaged.
    """
    found = []
    for baseline in (RANDOM, DOWNSAMPLE):
        gaps = _gaps(rows, baseline)
        worst = {label: min(own) for label, own in gaps.items() if min(own)[0] < 0}
        clear = [label for label, own in gaps.items() if any(clearly for *_, clearly in own)]
        said = [
            f"{label} ({points(gap)} at keep={keep})" for label, (gap, keep, _) in worst.items()
        ]
        found.append(Verdict(_WORDS[baseline], said, clear, len(gaps)))
    return [verdict for verdict in found if verdict.tried]


def _gaps(rows: Sequence[Row], baseline: str) -> dict[str, list[tuple[float, str, bool]]]:
    """By method: difference, keep, and whether its interval lies below zero, wherever it was
    compared with the baseline; one question has no interval."""
    found: dict[str, list[tuple[float, str, bool]]] = {}
    for row in rows:
        gap = row.get(f"vs_{baseline}")
        if gap is None or row["label"] in (FULL, *BASELINES):
            continue
        high = row[f"vs_{baseline}_high"]
        found.setdefault(name(row), []).append((gap, row["keep"], high is not None and high < 0))
    return found


def at_a_glance(rows: Sequence[Row]) -> str:
    """One sentence: the best method near 11 % of the tokens, and the baselines beside it."""
    budgets = {row["keep"]: row["kept_fraction"] for row in rows if row["label"] == RANDOM}
    if not budgets:
        return ""
    keep = min(budgets, key=lambda key: abs(budgets[key] - KEEP))
    there = [r for r in rows_at(rows, keep, budgets[keep]) if r["keep"] == keep]
    methods = [r for r in there if r["label"] not in (FULL, *BASELINES) and r["kept_fraction"] < 1]
    if not methods:
        return ""
    best = max(methods, key=lambda row: row["accuracy"])
    simple = [r for r in there if r["label"] in _WORDS]
    beside = ", ".join(f"{name(row)} {percent(row['accuracy'], 0)}" for row in simple)
    return (
        f"With {percent(best['kept_fraction'], 0)} of the tokens, the best method is {name(best)}: "
        f"{percent(best['accuracy'], 0)} right. Beside it: {beside}."
    )
