"""From a number in a sweep's table back to the questions it was computed from.

Everything is read from the sweep's folder: `table.json`, and below `cells` and `times` the files
that its rows name. The rows are computed again from the samples and compared with the table.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd

from vtc.errors import InputError, OptionError
from vtc.evaluation.compression import FULL, Compression
from vtc.evaluation.ranking import ranking
from vtc.evaluation.rows import Row
from vtc.evaluation.table import CURVE, pick, samples_frame, tables

CHOICES = ("model", "task", "method", "keep", "positions", "seed")
# the same samples give the same bits; another machine's sums may end in another digit
_CLOSE = 1e-9


@dataclass(frozen=True)
class Difference:
    """A number of the table that its samples do not give."""

    column: str
    table: Any
    samples: Any

    def __str__(self) -> str:
        return f"{self.column}: {self.table!r} in the table, {self.samples!r} from the samples"


@dataclass(frozen=True)
class Traced:
    """A row of the table, the files behind it, and what they do not confirm.

    Attributes:
        row: as the table has it.
        files: of its samples, and of their times.
        differences: none where the samples give every number of the row.
    """

    row: Row
    files: tuple[Path, ...]
    differences: tuple[Difference, ...]


def trace(out: Path, **wanted: str | None) -> list[Traced]:
    """Rows of a sweep's summary, each computed again from its samples.

    Args:
        out: the sweep's folder.
        wanted: what the rows have as `model`, `task`, `method` (its name, or with its options as
            the table writes it), `keep`, `positions`; None: anything. A `seed` asks for one seed's
            row instead of the one with seeds averaged.

    Returns:
        At least one.

    Raises:
        InputError: the folder holds no table, the table no such row, or a file that a row names is
            not there, damaged, or not the one that was answered.
    """
    content = _table(out)
    by_seed = wanted.get("seed") is not None
    rows = _chosen(out, content["rows" if by_seed else "summary"], wanted)
    frame = _frame(out, _needed(content, rows))
    found = {_key(row): row for row in tables(frame)[0 if by_seed else 1]}
    return [Traced(row, _files(out, row), _differences(row, found.get(_key(row)))) for row in rows]


def trace_areas(out: Path, **wanted: str | None) -> list[Traced]:
    """Rows of a sweep's ranking, each computed again from the samples of all methods ranked with
    it.

    Args:
        out: the sweep's folder.
        wanted: as for `trace`; an area is over all keeps and seeds, so neither is taken.

    Returns:
        At least one, with the files of its own curve and of the full model.

    Raises:
        OptionError: a `keep` or a `seed` is given.
        InputError: as `trace`.
    """
    for name in ("keep", "seed"):
        if wanted.get(name) is not None:
            raise OptionError(
                f"{name}={wanted[name]!r} and an area, expected one or the other: an area is over "
                "all keeps, its seeds averaged"
            )
    content = _table(out)
    rows = _chosen(out, content["ranking"], wanted)
    worlds = {(row["model"], row["task"]) for row in rows}
    seeds, summary = (
        [row for row in content[name] if (row["model"], row["task"]) in worlds]
        for name in ("rows", "summary")
    )
    frame = _frame(out, seeds)
    shares = [
        {**row, "kept_fraction": float(pick(frame, {**row, "seed": None})["kept_fraction"].mean())}
        for row in summary
    ]
    found = {_curve(row): row for row in ranking(frame, shares)}
    return [
        Traced(row, _files_of_curve(out, seeds, row), _differences(row, found.get(_curve(row))))
        for row in rows
    ]


def _chosen(out: Path, stored: Sequence[Row], wanted: Mapping[str, str | None]) -> list[Row]:
    """The rows that are wanted, at least one."""
    rows = [row for row in stored if _is_wanted(row, wanted)]
    if not rows:
        asked = " ".join(f"{k}={v}" for k, v in wanted.items() if v is not None)
        known = ", ".join(dict.fromkeys(str(row["label"]) for row in stored))
        raise InputError(
            f"{out / 'table.json'} has no row with {asked or 'anything'}, expected one of its "
            f"own; methods: {known}"
        )
    return rows


def _table(out: Path) -> dict[str, Any]:
    path = out / "table.json"
    try:
        content: dict[str, Any] = json.loads(path.read_bytes())
        named = all("cells" in row for name in ("rows", "summary") for row in content[name])
        named = named and "ranking" in content
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(
            f"{path} cannot be read ({error}), expected the table of `vtc sweep --out {out}`"
        ) from None
    if not named:
        raise InputError(
            f"{path} does not name the samples of its rows, expected a newer table; run the same "
            "sweep again, which answers nothing twice"
        )
    return content


def _is_wanted(row: Row, wanted: Mapping[str, str | None]) -> bool:
    given = {name: value for name, value in wanted.items() if value is not None}
    method = given.pop("method", None)
    named = method is None or method in (row["method"], row["label"])
    return named and all(str(row[name]) == value for name, value in given.items())


def _needed(content: Mapping[str, Any], rows: Sequence[Row]) -> list[Row]:
    """Rows by seed that the wanted ones are computed from: what they are compared with, and what
    their p-values are corrected with, is at the same keep."""
    ranked = {(row["model"], row["task"], row["keep"]) for row in rows}
    worlds = {(row["model"], row["task"]) for row in rows}
    return [
        row
        for row in content["rows"]
        if (row["model"], row["task"], row["keep"]) in ranked
        or (row["method"] == FULL and (row["model"], row["task"]) in worlds)
    ]


def _frame(out: Path, rows: Sequence[Row]) -> pd.DataFrame:
    cells = []
    for row in rows:
        how = Compression(
            row["method"],
            None if row["keep"] == "adaptive" else row["keep"],
            row["positions"],
            row["seed"],
            row["options"],
        )
        samples = [
            sample
            for cell in row["cells"]
            for sample in _read(out / "cells", cell)
            if sample["task"] == row["task"]
        ]
        times = {
            line["doc_id"]: line
            for cell in row["times"]
            for line in _read(out / "times", cell)
            if line["task"] == row["task"]
        }
        merged = [{**sample, **times.get(sample["doc_id"], {})} for sample in samples]
        cells.append((row["model"], how, merged))
    frame = samples_frame(cells)
    return frame.assign(cell=None, timed_in=None)


def _read(folder: Path, cell: str) -> list[dict[str, Any]]:
    """The samples of a cell, if they are those that its JSON vouches for."""
    path = samples_path(folder, cell)
    try:
        data = path.read_bytes()
        head = json.loads((folder / f"{cell}.json").read_bytes())
        expected = head["samples_sha256"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(
            f"{path} cannot be read ({error}), expected the samples of a row of the table; run the "
            "same sweep again"
        ) from None
    if hashlib.sha256(data).hexdigest() != expected:
        raise InputError(
            f"{path} was changed after it was written: its content is not what {cell}.json says; "
            "remove both and run the same sweep again"
        )
    return [json.loads(line) for line in data.splitlines()]


def samples_path(folder: Path, cell: str) -> Path:
    """Where the samples of a cell are."""
    return folder / f"{cell}.samples.jsonl"


def _files(out: Path, row: Row) -> tuple[Path, ...]:
    return tuple(
        samples_path(out / folder, cell) for folder in ("cells", "times") for cell in row[folder]
    )


def _files_of_curve(out: Path, seeds: Sequence[Row], curve: Row) -> tuple[Path, ...]:
    """The samples of a curve and of the full model, where it ends."""
    return tuple(
        samples_path(out / "cells", cell)
        for row in seeds
        if _curve(row) == _curve(curve)
        or (row["method"] == FULL and _curve(row)[:2] == _curve(curve)[:2])
        for cell in row["cells"]
    )


def _curve(row: Row) -> tuple[Any, ...]:
    return tuple(row[name] for name in CURVE)


def _key(row: Row) -> tuple[Any, ...]:
    return tuple(row[name] for name in ("model", "task", "label", "positions", "keep", "seed"))


def _differences(row: Row, found: Row | None) -> tuple[Difference, ...]:
    given = {k: v for k, v in row.items() if k not in ("cells", "times")}
    other = {k: v for k, v in (found or {}).items() if k not in ("cells", "times")}
    other["options"] = json.loads(json.dumps(other.get("options")))
    return tuple(
        Difference(name, given.get(name), other.get(name))
        for name in dict.fromkeys((*given, *other))
        if not _same(given.get(name), other.get(name))
    )


def _same(a: Any, b: Any) -> bool:
    numbers = all(isinstance(v, (int, float)) for v in (a, b))
    return math.isclose(a, b, rel_tol=_CLOSE, abs_tol=_CLOSE) if numbers else bool(a == b)
