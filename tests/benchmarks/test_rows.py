"""Rows: one for each key, whole at any moment; statistics."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from vtc.bench.rows import Store, key, of_one_machine, read, unique
from vtc.bench.stamp import commit, stamp
from vtc.bench.timing import device_ms, named, quantiles
from vtc.errors import InputError

ROW = {"bench": "kernels", "op": "compact", "case": "a", "provider": "torch", "dtype": "float32"}
HERE = {"gpu": None, "cpu": "this one"}


def test_a_row_takes_the_place_of_the_one_with_its_key(tmp_path: Path) -> None:
    path = tmp_path / "new" / "rows.jsonl"
    store = Store(path, HERE)
    for ms, case in ((1, "a"), (2, "b"), (3, "a")):
        store.add(ROW | {"case": case, "ms": ms})
        # whole after each of them
        assert [row["ms"] for row in read(path)][-1] in (1, 2)
    assert [(row["case"], row["ms"]) for row in read(path)] == [("a", 3), ("b", 2)]
    again = Store(path, HERE)
    again.add(ROW | {"case": "b", "ms": 4})
    assert [row["ms"] for row in read(path)] == [3, 4]
    assert [row["ms"] for row in again.added] == [4]


def test_another_machine_has_rows_of_its_own(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    for about in (HERE, {"gpu": "A GPU", "cpu": "this one"}, {"gpu": "A GPU", "cpu": "another"}):
        Store(path, about).add(dict(ROW))
    rows = read(path)
    assert len(rows) == len({key(row) for row in rows}) == 2
    assert of_one_machine([*rows, rows[1]]) == [rows[1], rows[1]]
    assert of_one_machine([]) == []


def test_the_key_is_what_was_measured_not_when_or_how_long() -> None:
    row = ROW | HERE
    assert key(row) == key(row | {"ms": 1, "date": "2026-01-01", "commit": "abc"})
    for name, other in (("op", "group_topk"), ("case", "b"), ("provider", "triton")):
        assert key(row) != key(row | {name: other})
    assert unique([row, row | {"ms": 2}]) == [row | {"ms": 2}]


@pytest.mark.parametrize("line", ["{", "[1]", '{"bench": "none"}', '{"op": "compact"}'])
def test_a_file_of_something_else_is_left_alone(tmp_path: Path, line: str) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps(ROW | HERE) + "\n" + line + "\n")
    before = path.read_text()
    with pytest.raises(InputError, match="line 2 of"):
        Store(path, HERE)
    assert path.read_text() == before


def test_without_a_file_rows_are_kept_in_memory() -> None:
    store = Store(None, HERE)
    store.add(dict(ROW))
    assert store.added == [ROW | HERE]


def test_quantiles_are_in_order_and_of_the_times_given() -> None:
    times = [5.0, 1.0, 4.0, 2.0, 3.0]
    median, low, high = quantiles(times)
    assert (low, median, high) == pytest.approx((1.8, 3.0, 4.2))
    assert quantiles([7.0]) == (7.0, 7.0, 7.0)
    assert named("ms", times) == {"ms": median, "ms_p20": low, "ms_p80": high}


def test_slow_calls_are_repeated_less() -> None:
    calls = 0

    def call() -> None:
        nonlocal calls
        calls += 1

    fast = device_ms(call, torch.device("cpu"), budget_ms=5, least=2, most=7)
    assert len(fast) == 7 and calls == 8
    slow = device_ms(lambda: sum(range(300_000)), torch.device("cpu"), budget_ms=1, least=2)
    assert len(slow) == 2


def test_the_stamp_says_where_and_when() -> None:
    said = stamp("cpu", "abc")
    assert said["gpu"] is None and said["cpu"] and said["torch"] == torch.__version__
    assert said["commit"] == "abc" and len(said["date"]) == 10
    assert commit() is None or len(commit() or "") >= 7
