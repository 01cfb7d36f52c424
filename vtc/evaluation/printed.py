"""The table as people read it: on the screen and, with the same cells, in the report."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from vtc.evaluation.table import FULL, Row

COLUMNS = (
    "method",
    "positions",
    "keep",
    "kept",
    "tokens",
    "accuracy",
    "vs full",
    "vs random",
    "evidence",
    "TTFT ms",
)
# the screen has less room than the page
_NOT_ON_SCREEN = ("tokens",)
_SCREEN_WIDTH = 118


def cells(row: Row) -> list[str]:
    """A row of the summary as text, in the order of `COLUMNS`; `n/a` where a number says nothing."""
    seeds = f" ×{row['seeds']}" if row["seeds"] > 1 else ""
    return [
        "full model" if row["method"] == FULL else row["label"] + seeds,
        "" if row["method"] == FULL else row["positions"],
        "" if row["method"] == FULL else row["keep"],
        percent(row["kept_fraction"], 1),
        number(row["llm_tokens"], 0),
        f"{100 * row['accuracy']:.1f} [{points(row, 'accuracy', signed=False)}]",
        difference(row, "vs_full") if row["method"] != FULL else "",
        difference(row, "vs_random") if row["method"] != FULL else "",
        evidence(row),
        number(row["ttft_ms"], 1),
    ]


def percent(value: float | None, digits: int) -> str:
    """0.123 as 12.3 %."""
    return "n/a" if value is None else f"{100 * value:.{digits}f} %"


def number(value: float | None, digits: int) -> str:
    """A number or `n/a`."""
    return "n/a" if value is None else f"{value:.{digits}f}"


def points(row: Mapping[str, Any], name: str, signed: bool = True) -> str:
    """The interval of `name`, in points."""
    sign = "+" if signed else ""
    low, high = (100 * row[f"{name}_{end}"] for end in ("low", "high"))
    return f"{low:{sign}.1f}, {high:{sign}.1f}"


def difference(row: Mapping[str, Any], name: str) -> str:
    """A paired difference and its interval, in points."""
    if row[name] is None:
        return ""
    return f"{100 * row[name]:+.1f} [{points(row, name)}]"


def evidence(row: Row) -> str:
    """Evidence recall; what merged tokens cover beside it where that is more."""
    text = percent(row["evidence_recall"], 0)
    covered = row["evidence_covered"]
    return f"{text} ({percent(covered, 0)} covered)" if covered is not None else text


def show(summary: Sequence[Row]) -> None:
    """Print one table per task."""
    from rich import box
    from rich.console import Console
    from rich.table import Table

    console = Console()
    # narrower, every number would break over several lines
    console.width = max(console.width, _SCREEN_WIDTH)
    shown = [i for i, name in enumerate(COLUMNS) if name not in _NOT_ON_SCREEN]
    for task in dict.fromkeys(row["task"] for row in summary):
        rows = [row for row in summary if row["task"] == task]
        title = f"{task}, {rows[0]['n']} questions, 95 % intervals, differences paired by question"
        table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False)
        for i in shown:
            table.add_column(COLUMNS[i], justify="left" if i < 2 else "right", no_wrap=True)
        for row, following in zip(rows, [*rows[1:], None], strict=True):
            end = following is None or (row["label"], row["positions"]) != (
                following["label"],
                following["positions"],
            )
            texts = cells(row)
            table.add_row(*(texts[i] for i in shown), end_section=end)
        console.print(table)
