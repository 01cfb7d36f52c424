"""`vtc bench`: exit status, what it prints, and that a machine without a GPU is told so."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from vtc.bench import gate, kernels
from vtc.bench.rows import read
from vtc.cli import main

TINY = ["bench", "--tiny", "--device", "cpu", "--runs", "1", "--methods", "uniform"]


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
def test_without_a_gpu_it_says_so(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench"]) == 2
    said = capsys.readouterr()
    assert said.out == "" and said.err.count("\n") == 1
    assert "no GPU that torch can use" in said.err and "--tiny" in said.err


def test_toys_are_called_toys(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "rows.jsonl"
    assert main([*TINY, "--out", str(out)]) == 0
    said = capsys.readouterr()
    assert "these times say nothing about speed" in said.out.splitlines()[0]
    assert "attention_rows" in said.out and "uniform" in said.out
    # no speed-up is said of toys
    assert "0×" not in said.out
    assert {row["bench"] for row in read(out)} == {"kernels", "ttft"}


def test_json_is_json_and_nothing_else(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*TINY, "--what", "kernels", "--json"]) == 0
    said = json.loads(capsys.readouterr().out)
    assert said["machine"] and said["green"] and not said["meaningful"]
    assert {row["bench"] for row in said["rows"]} == {"kernels"}


def test_what_is_red_is_status_1(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    red = gate.Parity(1.0, 0.1, 0.0, 0.1, True)
    monkeypatch.setattr(gate, "parity", lambda *_: red)
    assert main([*TINY, "--what", "ttft", "--json"]) == 1
    said = json.loads(capsys.readouterr().out)
    assert not said["green"] and {row["path"] for row in said["rows"]} == {"eager"}


def test_a_red_kernel_is_status_1(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(kernels, "kernel_call", lambda op, args, device: lambda: args[0] + 1)
    monkeypatch.setattr(kernels, "check", lambda *_: kernels.Check(1.0, 0.0))
    assert main([*TINY, "--what", "kernels"]) == 1
    assert "not everything was equal" in capsys.readouterr().out


@pytest.mark.parametrize(
    "wrong",
    [["--what", "all"], ["--models", "gpt2"], ["--runs", "0"], ["--methods", "vtc-cls"]],
)
def test_wrong_use_is_one_line(wrong: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    try:
        status = main([*TINY, *wrong])
    except SystemExit as stop:
        status = int(stop.code or 0)
    assert status == 2
    assert capsys.readouterr().err.splitlines()[-1].startswith("vtc: error: ")
