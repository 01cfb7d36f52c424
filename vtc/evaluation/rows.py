"""One row of the table: what a cell scored, what it kept and cost, and what it is compared with."""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd

from vtc.evaluation.broken import broken, broken_accuracy, broken_share
from vtc.evaluation.compression import FULL
from vtc.evaluation.scores import DOWNSAMPLE, Scores
from vtc.evaluation.statistics import (
    Interval,
    accuracy_interval,
    difference_interval,
    mcnemar,
    ratio_interval,
)

Row = dict[str, Any]

NAMES = ("model", "task", "method", "options", "label", "positions", "keep")
MEANS = (
    "kept_fraction",
    "active_fraction",
    "visual_tokens",
    "llm_tokens",
    "layer_mean_tokens",
    "evidence_recall",
    "evidence_covered",
    "flops",
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
# what lies between p20 and p80 is the middle 60 %
_SPREAD = {"p20": 0.2, "p80": 0.8}
_OVER_IMAGES = {"min": 0.0, "p20": 0.2, "p50": 0.5, "p80": 0.8, "max": 1.0}


def row_of(scores: Scores, part: pd.DataFrame) -> Row:
    """The row of some samples of one cell, of one of its seeds or of all.

    `cells` and `times` name the files of its samples and of their times, see `vtc trace`. Without
    `p_random_holm` and `p_downsample_holm`, which depend on the other rows.
    """
    first, seeds = part.iloc[0], part["seed"].unique()
    row: Row = {name: first[name] for name in NAMES}
    row |= {"seed": int(seeds[0]) if len(seeds) == 1 else None, "seeds": len(seeds)}
    row["n"] = part["doc_id"].nunique()
    row |= interval_columns("accuracy", accuracy_interval(scores.mean(row)))
    kinds = part.groupby("kind")["score"].mean()
    row |= {kind_column(kind): float(accuracy) for kind, accuracy in kinds.items()}
    files = {"cells": _distinct(part, "cell"), "times": _distinct(part, "timed_in")}
    return row | _cost(part) | _compared(scores, row) | files


def _distinct(part: pd.DataFrame, column: str) -> list[str]:
    """What samples have there, each once."""
    return sorted(part[column].dropna().unique()) if column in part else []


def _cost(part: pd.DataFrame) -> Row:
    """The accounting: tokens and evidence as means over questions, times and bytes as medians."""
    row: Row = {name: number(part[name].mean()) for name in MEANS}
    row |= {f"kept_{name}": value for name, value in _over_images(part).items()}
    row |= {name: number(part[name].median()) for name in MEDIANS}
    row |= {f"ttft_ratio_{p}": number(part["ttft_ratio"].quantile(q)) for p, q in _SPREAD.items()}
    row["n_timed"] = int(part["ttft_ms"].notna().sum())
    return row | {"kernels": " | ".join(_distinct(part, "kernels")) or None}


def _over_images(part: pd.DataFrame) -> dict[str, float | None]:
    """The realized share of each image (not of each question: some show several)."""
    column = part.get("image_kept_fractions")
    if column is None or column.isna().all():
        column = part["kept_fraction"]
    shares = pd.to_numeric(column.explode()).dropna().to_numpy(float)
    if not len(shares):
        return dict.fromkeys(("mean", *_OVER_IMAGES))
    ends = {name: float(np.quantile(shares, q)) for name, q in _OVER_IMAGES.items()}
    return {"mean": float(shares.mean()), **ends}


def _compared(scores: Scores, row: Row) -> Row:
    """Against the full model, random choice, downsampling and original position ids."""
    own, full = scores.mean(row), scores.full(row)
    whole = None if full is None else scores.mean(full)
    random, smaller = scores.random(row), scores.downsample(row)
    found = interval_columns("vs_full", None if whole is None else difference_interval(own, whole))
    relative = None if whole is None else ratio_interval(own, whole)
    found |= interval_columns("relative_accuracy", relative)
    for name, other in (("random", random), (DOWNSAMPLE, smaller)):
        gap = None if other is None else difference_interval(own, scores.mean(other))
        found |= interval_columns(f"vs_{name}", gap)
        tested = None if other is None else mcnemar(scores.by_seed(row), scores.by_seed(other))
        found |= {f"p_{name}": tested, f"p_{name}_holm": None}
    other = scores.original_ids(row)
    gap = None if other is None else difference_interval(own, scores.mean(other))
    found |= interval_columns("vs_original_ids", gap)
    if whole is None or smaller is None or row["method"] == FULL:
        found |= {"broken_n": None, "broken_share": None}
        return found | interval_columns("broken_accuracy", None)
    pair = whole, scores.mean(smaller)
    found |= {"broken_n": int(broken(*pair).sum()), "broken_share": broken_share(*pair)}
    return found | interval_columns("broken_accuracy", broken_accuracy(own, *pair))


def kind_column(kind: Any) -> str:
    """The column of the accuracy on a kind of question; `accuracy_low` and `accuracy_high` are ends
    of an interval, whatever kinds there are."""
    return f"accuracy_of_{kind}" if kind in ("low", "high") else f"accuracy_{kind}"


def interval_columns(name: str, interval: Interval | None) -> Row:
    """The three columns of an interval; None for what is not there."""
    value, low, high = map(number, interval or (None, None, None))
    return {name: value, f"{name}_low": low, f"{name}_high": high}


def number(value: Any) -> float | None:
    """A number as JSON has it; what says nothing is None."""
    return None if pd.isna(value) else float(value)
