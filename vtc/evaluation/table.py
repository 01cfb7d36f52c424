"""From samples to rows: accuracies with intervals, paired differences, means and medians."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import pandas as pd
from tqdm import tqdm

from vtc.evaluation.compression import FULL, Compression, controls
from vtc.evaluation.rows import MEANS, MEDIANS, row_of
from vtc.evaluation.rows import Row as Row
from vtc.evaluation.scores import Scores
from vtc.evaluation.statistics import holm

CURVE = ["model", "task", "label", "positions"]
GROUP = [*CURVE, "keep"]
# what is ranked together, and corrected together for being several
RANKED = ["model", "task", "keep"]
Cell = tuple[str, Compression, Sequence[Mapping[str, Any]]]


class CurveKey(NamedTuple):
    """What the points of one curve have in common."""

    model: str
    task: str
    label: str
    positions: str


def samples_frame(cells: Iterable[Cell]) -> pd.DataFrame:
    """One line per cell and question, of cells with the short name of their model.

    `ttft_ratio` is the time to the first token over the full model's on the same question, taken
    right before.
    """
    lines = [
        {
            "model": model,
            "label": cell.label,
            "method": cell.method,
            "options": dict(cell.options),
            "positions": cell.positions,
            "keep": _key(cell.keep),
            "seed": cell.seed,
            **sample,
        }
        for model, cell, samples in cells
        for sample in samples
    ]
    frame = pd.DataFrame(lines)
    for name in (*MEANS, *MEDIANS, "full_ttft_ms"):
        frame[name] = pd.to_numeric(frame[name]) if name in frame else float("nan")
    frame["ttft_ratio"] = frame["ttft_ms"] / frame["full_ttft_ms"]
    return frame


def _key(keep: float | int | str | None) -> str:
    """`keep` as on a command line: 1 token and 1.0 differ, and None is a group of its own."""
    return "adaptive" if keep is None else f"{keep}tok" if isinstance(keep, int) else str(keep)


def tables(frame: pd.DataFrame) -> tuple[list[Row], list[Row]]:
    """Rows per cell, and the same with the seeds of a method averaged per question.

    Each row is compared with the full model, with `random` (or what draws in its place, see
    `controls`) under the same keep and positions, with `downsample` at the same keep, and with
    original position ids: `vs_...` are differences of accuracy with paired bootstrap intervals,
    `relative_accuracy` the accuracy over the full model's. `p_random` and `p_downsample` are of
    McNemar's exact test (`statistics.mcnemar` says how several seeds are paired); in `..._holm`
    they are corrected for all rows of the table with the same model, task and keep. `broken_...`:
    see `vtc.evaluation.broken`. None: there is nothing to compare with, or too little.

    Raises:
        VtcError: two cells of a model and task hold different questions.
    """
    scores = Scores(frame)
    found = []
    for names in ([*GROUP, "seed"], GROUP):
        groups = list(frame.groupby(names, sort=False))
        bar = tqdm(groups, desc="table", unit="row", delay=2, leave=False, dynamic_ncols=True)
        rows = [row_of(scores, part) for _, part in bar]
        _correct(rows)
        found.append(rows)
    return found[0], found[1]


def _correct(rows: Sequence[Row]) -> None:
    """Holm's correction over the rows that are ranked together."""
    together: dict[tuple[Any, ...], list[Row]] = {}
    for row in rows:
        together.setdefault(tuple(row[name] for name in RANKED), []).append(row)
    for ranked in together.values():
        for name in ("p_random", "p_downsample"):
            for row, value in zip(ranked, holm(row[name] for row in ranked), strict=True):
                row[f"{name}_holm"] = value


def scores(part: pd.DataFrame) -> pd.Series:
    """The score of every question, averaged over seeds, in the order of the questions."""
    mean: pd.Series = part.groupby("doc_id")["score"].mean()
    return mean


def curves(summary: Sequence[Row], by: str = "kept_fraction") -> dict[CurveKey, list[Row]]:
    """Rows by model, task, method and positions, the largest share first, behind the full model's.

    Args:
        summary: rows with seeds averaged.
        by: `"kept_fraction"` or `"active_fraction"`.
    """
    found: dict[CurveKey, list[Row]] = {}
    for row in summary:
        if row["method"] != FULL:
            found.setdefault(CurveKey(*(row[name] for name in CURVE)), []).append(row)
    for curve, rows in found.items():
        full = [row for row in summary if row["method"] == FULL and same_world(row, curve)]
        rows[:] = full + sorted(rows, key=lambda row: -row[by])
    return found


def same_world(row: Row, curve: CurveKey) -> bool:
    """Whether a row is of the curve's model and task."""
    return (row["model"], row["task"]) == (curve.model, curve.task)


def drops_tokens(rows: Iterable[Row]) -> bool:
    """Whether a method keeps fewer tokens somewhere; if not, only layers can tell its budgets."""
    return any(row["method"] != FULL and row["kept_fraction"] < 1 for row in rows)


def control(rows: Sequence[Row], row: Row) -> Row | None:
    """The row that chooses at random what `row` chooses, at the same keep, if there is one.

    Under the same positions where it was run under them.
    """
    for label in controls(row["method"], row["options"]):
        if label == row["label"]:
            return None
        key = (row["model"], row["task"], label, row["keep"])
        same = [r for r in rows if (r["model"], r["task"], r["label"], r["keep"]) == key]
        if same:
            return next((r for r in same if r["positions"] == row["positions"]), same[0])
    return None


def pick(frame: pd.DataFrame, row: Mapping[str, Any]) -> pd.DataFrame:
    """The samples of a row."""
    names = [*GROUP, *(["seed"] if row["seed"] is not None else [])]
    mask = pd.Series(True, index=frame.index)
    for name in names:
        mask &= frame[name] == row[name]
    return frame[mask]
