"""From samples to rows: accuracies with intervals, paired differences, means and medians."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import pandas as pd

from vtc.evaluation.compression import Compression
from vtc.evaluation.statistics import Interval, accuracy_interval, difference_interval

FULL, RANDOM = "none", "random"
CURVE = ["task", "label", "positions"]
GROUP = [*CURVE, "keep"]
MEANS = ("kept_fraction", "visual_tokens", "llm_tokens", "evidence_recall", "evidence_covered")
MEDIANS = ("encoder_ms", "selector_ms", "ttft_ms", "tpot_ms", "kv_bytes", "peak_memory_bytes")
Row = dict[str, Any]


def samples_frame(cells: Iterable[tuple[Compression, Sequence[Mapping[str, Any]]]]) -> pd.DataFrame:
    """One line per cell and question."""
    lines = [
        {
            "label": cell.label,
            "method": cell.method,
            "options": dict(cell.options),
            "positions": cell.positions,
            "keep": _key(cell.keep),
            "seed": cell.seed,
            **sample,
        }
        for cell, samples in cells
        for sample in samples
    ]
    frame = pd.DataFrame(lines)
    for name in (*MEANS, *MEDIANS):
        frame[name] = pd.to_numeric(frame[name]) if name in frame else float("nan")
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


def curves(summary: Sequence[Row]) -> dict[tuple[str, str, str], list[Row]]:
    """Rows by task, method and positions, most tokens first; the full model starts each of them."""
    found: dict[tuple[str, str, str], list[Row]] = {}
    for row in summary:
        if row["method"] != FULL:
            found.setdefault((row["task"], row["label"], row["positions"]), []).append(row)
    for (task, _, _), rows in found.items():
        full = [row for row in summary if row["method"] == FULL and row["task"] == task]
        rows[:] = full + sorted(rows, key=lambda row: -row["kept_fraction"])
    return found


def pick(frame: pd.DataFrame, row: Mapping[str, Any]) -> pd.DataFrame:
    """The samples of a row."""
    mask = pd.Series(True, index=frame.index)
    for name in (*GROUP, *(["seed"] if row["seed"] is not None else [])):
        mask &= frame[name] == row[name]
    return frame[mask]


def _row(frame: pd.DataFrame, part: pd.DataFrame) -> Row:
    first, seeds = part.iloc[0], part["seed"].unique()
    own = scores(part)
    row: Row = {
        name: first[name] for name in ("task", "method", "options", "label", "positions", "keep")
    }
    row |= {"seed": int(seeds[0]) if len(seeds) == 1 else None, "seeds": len(seeds), "n": len(own)}
    row |= _interval("accuracy", accuracy_interval(own.to_numpy(float)))
    if pd.notna(first["kind"]):
        row |= {
            f"accuracy_{kind}": float(v) for kind, v in part.groupby("kind")["score"].mean().items()
        }
    row |= {name: _number(part[name].mean()) for name in MEANS}
    row |= {name: _number(part[name].median()) for name in MEDIANS}
    row["n_timed"] = int(part["ttft_ms"].notna().sum())
    row |= _difference("vs_full", own, _reference(frame, first, FULL))
    against = _reference(frame, first, RANDOM) if first["label"] != RANDOM else frame.iloc[:0]
    row |= _difference("vs_random", own, against)
    row |= _difference("vs_original_ids", own, _with_original_ids(frame, first, seeds))
    return row


def _reference(frame: pd.DataFrame, of: pd.Series, method: str) -> pd.DataFrame:
    """The samples to compare with: the full model, or `random` at the same keep and positions."""
    found: pd.DataFrame = frame[(frame["task"] == of["task"]) & (frame["label"] == method)]
    if method != FULL:
        found = found[(found["keep"] == of["keep"]) & (found["positions"] == of["positions"])]
    return found


def _with_original_ids(frame: pd.DataFrame, of: pd.Series, seeds: Any) -> pd.DataFrame:
    """The same method, budget and seeds with original position ids; nothing if these are they."""
    if of["positions"] == "keep":
        return frame.iloc[:0]
    mask = (frame["positions"] == "keep") & frame["seed"].isin(seeds)
    for name in ("task", "label", "keep"):
        mask &= frame[name] == of[name]
    return frame[mask]


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
