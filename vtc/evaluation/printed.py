"""The table as people read it: on the screen and, with the same cells, in the report."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from vtc.evaluation.compression import FULL
from vtc.evaluation.rows import Row

COLUMNS = (
    "method",
    "positions",
    "keep",
    "kept",
    "tokens",
    "active",
    "accuracy",
    "of full's",
    "vs full",
    "vs random",
    "vs downsample",
    "vs original ids",
    "broken",
    "evidence",
    "TTFT ms",
    "of full",
)
# the screen has less room than the page
NOT_ON_SCREEN = ("tokens", "active", "of full's", "broken")
# a file as an option has it: in quotes of either kind, or bare
_NAMED = re.compile(
    r"""calibration=(?:'(?:[^']*/)?([^'/]+)'|"(?:[^"]*/)?([^"/]+)"|(?:[^,@+'"]*/)?([^,@+'"/]+))"""
)
# where a comparison would be one with itself
_NONE = "—"


def cells(row: Row) -> list[str]:
    """A row of the summary as text, in the order of `COLUMNS`; `n/a`: a number says nothing."""
    seeds = f" ×{row['seeds']}" if row["seeds"] > 1 else ""
    return [
        name(row) + seeds,
        row["positions"],
        row["keep"],
        percent(row["kept_fraction"], 1),
        number(row["llm_tokens"], 0),
        percent(row["active_fraction"], 1),
        f"{100 * row['accuracy']:.1f} {interval(row, 'accuracy', signed=False)}",
        percent(row["relative_accuracy"], 1),
        difference(row, "vs_full") if row["method"] != FULL else _NONE,
        tested(row, "random"),
        tested(row, "downsample"),
        difference(row, "vs_original_ids"),
        broken(row),
        evidence(row),
        number(row["ttft_ms"], 1),
        percent(row["ttft_ratio"], 0),
    ]


def by_column(row: Row) -> dict[str, str]:
    """A row of the summary as text, by column."""
    return dict(zip(COLUMNS, cells(row), strict=True))


def area_by_column(row: Row) -> dict[str, str]:
    """A row of the ranking as text, by column; areas in percent of the full model's."""
    area = "n/a" if row["area"] is None else f"{100 * row['area']:.1f}"
    return {
        "method": name(row),
        "positions": row["positions"],
        "area": f"{area} {interval(row, 'area', signed=False)}",
        "vs random": tested(row, "random"),
        "vs downsample": tested(row, "downsample"),
    }


def name(row: Row) -> str:
    """What a row's method is called; of a calibration file, only the name."""
    return "full model" if row["method"] == FULL else short(row["label"])


def short(label: str) -> str:
    """A label without the folders of a file that it names: they say nothing about the method."""
    return _NAMED.sub(lambda found: "calibration=" + next(filter(None, found.groups())), label)


def percent(value: float | None, digits: int) -> str:
    """0.123 as 12.3 %."""
    return "n/a" if value is None else f"{100 * value:.{digits}f} %"


def number(value: float | None, digits: int) -> str:
    """A number or `n/a`."""
    return "n/a" if value is None else f"{value:.{digits}f}"


def points(value: float, signed: bool = True) -> str:
    """A share or a difference of shares in points; what rounds to zero is not negative."""
    return f"{round(100 * value, 1) + 0.0:{'+' if signed else ''}.1f}"


def interval(row: Mapping[str, Any], name: str, signed: bool = True) -> str:
    """The interval of `name`, in points; one question has none."""
    low, high = row[f"{name}_low"], row[f"{name}_high"]
    return "[n/a]" if low is None else f"[{points(low, signed)}, {points(high, signed)}]"


def difference(row: Mapping[str, Any], name: str) -> str:
    """A paired difference and its interval, in points."""
    if row[name] is None:
        return _NONE
    return f"{points(row[name])} {interval(row, name)}"


def tested(row: Mapping[str, Any], name: str) -> str:
    """A difference to a baseline with its p-value after Holm's correction."""
    value, p = difference(row, f"vs_{name}"), row[f"p_{name}_holm"]
    return value if p is None else f"{value} {chance(p)}"


def chance(p: float) -> str:
    """A p-value in words."""
    return "p<0.001" if p < 0.001 else f"p={p:.3f}"


def broken(row: Row) -> str:
    """Accuracy on the questions that downsampling breaks, and how many these are."""
    if row["broken_n"] is None:
        return _NONE
    if row["broken_accuracy"] is None:
        return f"n/a ({row['broken_n']})"
    ends = interval(row, "broken_accuracy", signed=False)
    return f"{100 * row['broken_accuracy']:.1f} {ends} ({row['broken_n']})"


def evidence(row: Row) -> str:
    """Evidence recall; beside it what merged tokens cover, unless the method only merges."""
    text = percent(row["evidence_recall"], 0)
    if row["evidence_recall"] is None or row["evidence_covered"] is None:
        return text
    return f"{text} ({percent(row['evidence_covered'], 0)} covered)"


def show(summary: Sequence[Row]) -> None:
    """Print one table per model and task."""
    from rich.console import Console

    console = Console()
    several = len({row["model"] for row in summary}) > 1
    for model, task in dict.fromkeys((row["model"], row["task"]) for row in summary):
        rows = [row for row in summary if (row["model"], row["task"]) == (model, task)]
        table = _table(f"{model}, {task}" if several else task, rows)
        # a narrower screen breaks long lines; rich would cut the numbers
        unlimited = console.options.update(max_width=1000)
        console.width = max(console.width, console.measure(table, options=unlimited).maximum)
        console.print(table)


def _table(what: str, rows: Sequence[Row]) -> Any:
    from rich import box
    from rich.table import Table

    shown = [i for i, column in enumerate(COLUMNS) if column not in NOT_ON_SCREEN]
    said = "95 % intervals, differences paired by question, p after Holm"
    title = f"{what}, {rows[0]['n']} questions, {said}"
    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False)
    for i in shown:
        table.add_column(COLUMNS[i], justify="left" if i < 2 else "right", no_wrap=True)
    for row, following in zip(rows, [*rows[1:], None], strict=True):
        texts = cells(row)
        end = following is None or row["label"] != following["label"]
        table.add_row(*(texts[i] for i in shown), end_section=end)
    return table
