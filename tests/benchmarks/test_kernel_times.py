"""The benchmark of kernels on toy shapes: its gate, its rows, what it prints."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from vtc import ops
from vtc.bench import kernel_checks, kernels, tables
from vtc.bench.kernel_cases import Case, cases
from vtc.bench.rows import read

FOLDER = Path(__file__).parents[2] / "benchmarks"
CPU = torch.device("cpu")
TINY = {case.op: case for case in cases(tiny=True)}
ACCELERATED = {name for name in vars(ops) if hasattr(getattr(ops, name), "reference")}


def reference(op: str, args: tuple[Any, ...], device: torch.device) -> Callable[[], Any]:
    """A stand-in for a kernel that is equal to its operation."""
    return lambda: getattr(ops, op).reference(*args)


def broken(op: str, args: tuple[Any, ...], device: torch.device) -> Callable[[], Any]:
    """One that is not, for one operation."""
    call = reference(op, args, device)
    return (lambda: call() + 1) if op == "compact" else call


def test_every_operation_with_a_kernel_is_measured() -> None:
    assert set(TINY) == {case.op for case in cases()} == ACCELERATED


def test_rows_say_what_was_measured(
    load: Callable[[str], Any], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(kernels, "kernel_call", reference)
    assert load("kernel_times").main(["--tiny", "--out", str(tmp_path), "--commit", "abc"]) == 0
    rows = read(tmp_path / "rows.jsonl")
    assert {(row["op"], row["provider"]) for row in rows} == {
        (op, provider) for op in TINY for provider in ("triton", "torch", "official")
    }
    for row in rows:
        assert 0 < row["ms_p20"] <= row["ms"] <= row["ms_p80"] and row["runs"] >= 5
        assert row["bytes"] > 0 and row["floor_ms"] > 0
        assert row["of_floor"] == pytest.approx(row["floor_ms"] / row["ms"])
        assert not row["meaningful"] and row["commit"] == "abc" and row["gpu"] is None
        assert (row["parity"] is not None) == (row["provider"] == "triton")
    # a second run adds none
    assert load("kernel_times").main(["--tiny", "--out", str(tmp_path), "--ops", "compact"]) == 0
    assert len(read(tmp_path / "rows.jsonl")) == len(rows)


def test_a_red_kernel_has_no_time(
    load: Callable[[str], Any],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(kernels, "kernel_call", broken)
    given = ["--tiny", "--out", str(tmp_path), "--ops", "compact,packed_index"]
    assert load("kernel_times").main(given) == 1
    assert {row["op"] for row in read(tmp_path / "rows.jsonl")} == {"packed_index"}
    said = capsys.readouterr()
    assert "compact tiny: NOT EQUAL, so not timed" in said.err
    assert "compact" not in said.out and "packed_index" in said.out


def test_without_a_kernel_the_rest_is_measured_and_no_speedup_said() -> None:
    store = kernels.Store(None, {"gpu": None, "cpu": "x"})
    assert kernels.run(kernels.Settings(CPU, tiny=True, ops=["group_topk"]), store)
    found = {row["provider"]: row for row in store.added}
    assert "ms" not in found["triton"] and "expected a CUDA device" in found["triton"]["missing"]
    assert "ms" in found["torch"]
    head, line = tables.kernel_table(store.added)
    assert all(line[head.index(name)] == tables.NONE for name in ("kernel, ms", "× torch"))


def test_an_operation_that_is_unknown_is_wrong_use(load: Callable[[str], Any]) -> None:
    with pytest.raises(SystemExit) as stop:
        load("kernel_times").main(["--tiny", "--ops", "softmax"])
    assert stop.value.code == 2


def swapped(out: tuple[torch.Tensor, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    """One chosen token of the first group replaced by one that is not."""
    keep = out[0].clone()
    left = sorted(set(range(24)) - set(keep[0].tolist()))
    keep[0, -1] = left[0]
    return keep.sort(-1).values, out[1]


@pytest.mark.parametrize("case", TINY.values(), ids=list(TINY))
def test_checks_tell_right_from_wrong(case: Case) -> None:
    given = case.make(CPU)
    right = getattr(ops, case.op).reference(*given.args)
    assert kernel_checks.check(case.op, given.args, right, given.official).green
    if case.loops:
        wrong = swapped(right)
    elif isinstance(right, tuple):
        wrong = (right[0] + 1, right[1])
    else:
        wrong = right * 1.01
    assert not kernel_checks.check(case.op, given.args, wrong, given.official).green


@pytest.mark.parametrize("case", TINY.values(), ids=list(TINY))
def test_official_ways_give_what_the_operation_gives(case: Case) -> None:
    given = case.make(CPU)
    want = getattr(ops, case.op).reference(*given.args)
    got = given.official()
    want = want[0] if isinstance(want, tuple) else want
    torch.testing.assert_close(got.reshape(want.shape), want, rtol=1e-4, atol=1e-5)


def test_a_nan_is_red() -> None:
    assert not kernel_checks.Check(float("nan"), 1.0).green
    assert kernel_checks.Check(0.0, 0.0).green


@pytest.mark.slow
def test_kernels_as_the_interpreter_runs_them(tmp_path: Path) -> None:
    pytest.importorskip("triton")
    command = [sys.executable, str(FOLDER / "kernel_times.py"), "--tiny", "--ops"]
    command += ["compact,attention_rows", "--out", str(tmp_path)]
    about = os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    subprocess.run(command, env=about, check=True, timeout=300, capture_output=True)
    lines = (tmp_path / "rows.jsonl").read_text().splitlines()
    found = [row for row in map(json.loads, lines) if row["provider"] == "triton"]
    assert {row["op"] for row in found} == {"compact", "attention_rows"}
    assert all(row["ms"] > 0 and not row["meaningful"] for row in found)
