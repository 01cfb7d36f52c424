"""From samples to rows: accuracies with intervals, paired differences, means and medians."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import pandas as pd

from vtc.evaluation.compression import FULL, Compression, controls
from vtc.evaluation.statistics import Interval, accuracy_interval, difference_interval

CURVE = ["model", "task", "label", "positions"]
GROUP = [*CURVE, "keep"]
MEANS = (
    "kept_fraction",
    "active_fraction",
    "visual_tokens",
    "llm_tokens",
    "evidence_recall",
    "evidence_covered",
)
MEDIANS = (
    "encoder_ms",
    "selector_ms",
    "ttft_ms",
    "ttft_ratio",
    "tpot_ms",
    "kv_bytes",
    "peak_memory_bytes",
)
_NAMES = ("model", "task", "method", "options", "label", "positions", "keep")
# what lies between them is the middle 60 % of the timed questions
_SPREAD = {"p20": 0.2, "p80": 0.8}
Row = dict[str, Any]
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
    """Rows per cell, and the same with the seeds of a method averaged per question."""
    rows = [_row(frame, part) for _, part in frame.groupby([*GROUP, "seed"], sort=False)]
    summary = [_row(frame, part) for _, part in frame.groupby(GROUP, sort=False)]
    return rows, summary


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
    return frame[_of(frame, **{name: row[name] for name in names})]


def _row(frame: pd.DataFrame, part: pd.DataFrame) -> Row:
    first, seeds = part.iloc[0], part["seed"].unique()
    own = scores(part)
    row: Row = {name: first[name] for name in _NAMES}
    row |= {"seed": int(seeds[0]) if len(seeds) == 1 else None, "seeds": len(seeds), "n": len(own)}
    row |= _interval("accuracy", accuracy_interval(own.to_numpy(float)))
    if pd.notna(first["kind"]):
        row |= {
            f"accuracy_{kind}": float(v) for kind, v in part.groupby("kind")["score"].mean().items()
        }
    row |= {name: _number(part[name].mean()) for name in MEANS}
    row |= {name: _number(part[name].median()) for name in MEDIANS}
    row |= {f"ttft_ratio_{p}": _number(part["ttft_ratio"].quantile(q)) for p, q in _SPREAD.items()}
    row["n_timed"] = int(part["ttft_ms"].notna().sum())
    row |= _difference(
        "vs_full", own, frame[_of(frame, model=first["model"], task=first["task"], label=FULL)]
    )
    row |= _difference("vs_random", own, _control(frame, first))
    row |= _difference("vs_original_ids", own, _with_original_ids(frame, first, seeds))
    return row


def _control(frame: pd.DataFrame, of: pd.Series) -> pd.DataFrame:
    """The samples that were chosen at random, at the same keep and positions."""
    same = {name: of[name] for name in ("model", "task", "keep", "positions")}
    for label in controls(of["method"], of["options"]):
        if label == of["label"]:
            break
        if (mask := _of(frame, label=label, **same)).any():
            return frame[mask]
    return frame.iloc[:0]


def _with_original_ids(frame: pd.DataFrame, of: pd.Series, seeds: Any) -> pd.DataFrame:
    """The same method, budget and seeds with original position ids; nothing if these are they."""
    if of["positions"] == "keep":
        return frame.iloc[:0]
    same = {name: of[name] for name in ("model", "task", "label", "keep")}
    return frame[_of(frame, positions="keep", **same) & frame["seed"].isin(seeds)]


def _of(frame: pd.DataFrame, **wanted: Any) -> pd.Series:
    """Which samples have these values: `bool` by sample."""
    mask = pd.Series(True, index=frame.index)
    for name, value in wanted.items():
        mask &= frame[name] == value
    return mask


def _difference(name: str, own: pd.Series, other: pd.DataFrame) -> Row:
    if other.empty:
        return _interval(name, None)
    reference = scores(other).reindex(own.index)
    return _interval(name, difference_interval(own.to_numpy(float), reference.to_numpy(float)))


def _interval(name: str, interval: Interval | None) -> Row:
    value, low, high = map(_number, interval or (None, None, None))
    return {name: value, f"{name}_low": low, f"{name}_high": high}


def _number(value: Any) -> float | None:
    return None if pd.isna(value) else float(value)
