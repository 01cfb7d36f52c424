"""Rows of measurements in a JSONL file: one for each key, written as soon as it is measured."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from vtc.commands.files import replacing
from vtc.errors import InputError

Row = dict[str, Any]

# what tells rows apart, by kind of benchmark; the machine is part of all of them
KEYS = {
    "kernels": ("op", "case", "provider", "dtype"),
    "ttft": ("model", "batch", "images", "method", "keep", "options", "path", "attention"),
    "selection": ("model", "method", "keep", "options", "path"),
    "scale": ("model", "axis", "batch", "images", "method", "keep", "path"),
}


def key(row: Row) -> str:
    """What a row is about and where it was measured; a later row with the same key takes its
    place."""
    about = [json.dumps(row.get(name), sort_keys=True) for name in KEYS[row["bench"]]]
    return "/".join([row["bench"], *about, str(row["gpu"] or row["cpu"])])


def read(path: Path) -> list[Row]:
    """The rows of a file, none if it is not there.

    Raises:
        InputError: a line is no row.
    """
    if not path.exists():
        return []
    found = []
    for number, line in enumerate(path.read_text().splitlines(), 1):
        try:
            row = json.loads(line)
            key(row)
        except (ValueError, KeyError, TypeError, AttributeError):
            raise InputError(
                f"line {number} of {str(path)!r} is no row of a benchmark, expected JSON with "
                f"bench, one of {', '.join(KEYS)}: name a rows.jsonl"
            ) from None
        found.append(row)
    return found


def unique(rows: Iterable[Row]) -> list[Row]:
    """The last row of each key, where the first one stood."""
    return list({key(row): row for row in rows}.values())


def of_one_machine(rows: Sequence[Row]) -> list[Row]:
    """Those of the machine with most rows: times of two are not put beside each other."""
    machines = [row["gpu"] or row["cpu"] for row in rows]
    most = max(dict.fromkeys(machines), key=machines.count, default=None)
    return [row for row, machine in zip(rows, machines, strict=True) if machine == most]


class Store:
    """A file of rows that is whole at any moment.

    Args:
        path: the file; None: rows are only kept in memory.
        about: what is added to every row, see `stamp`.

    Attributes:
        added: rows of this run.
    """

    def __init__(self, path: Path | None, about: Row) -> None:
        self.path, self._about = path, about
        self.added: list[Row] = []
        if path is not None:
            path.parent.mkdir(parents=True, exist_ok=True)
            write(path, read(path))

    def add(self, row: Row) -> Row:
        """Write a row in place of the one with its key; returns it as written."""
        row = row | self._about
        self.added = unique([*self.added, row])
        if self.path is not None:
            write(self.path, [*read(self.path), row])
        return row


def write(path: Path, rows: Sequence[Row]) -> None:
    """Write the last row of each key, whole or not at all."""
    text = "".join(json.dumps(row) + "\n" for row in unique(rows))
    with replacing(path) as temporary:
        temporary.write_text(text)
