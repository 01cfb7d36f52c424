"""What a choice costs: rows of toys, and the table of rows."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import vtc
from vtc.bench.rows import read


def test_measures_both_paths_of_each_method(
    load: Callable[[str], Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given = ["--tiny", "--runs", "2", "--methods", "vtc_cls,uniform", "--models", "llava-1.5-7b"]
    assert load("selection_times").main([*given, "--device", "cpu", "--out", str(tmp_path)]) == 0
    rows = read(tmp_path / "rows.jsonl")
    assert [(r["method"], r["path"]) for r in rows] == [
        ("vtc_cls", "eager"),
        ("vtc_cls", "fast"),
        ("uniform", "eager"),
        ("uniform", "fast"),
    ]
    for row in rows:
        assert 0 < row["selector_ms"] < row["ttft_ms"]
        assert not row["meaningful"]
        assert row["kept_tokens"] == [max(1, round(64 * row["visual_tokens"] / 576))]
    assert "toy shapes" in capsys.readouterr().out


def test_what_is_slow_is_named(load: Callable[[str], Any]) -> None:
    about = {"model": "llava-1.5-7b", "path": "eager", "dtype": "bfloat16", "gpu": "a card"}
    about |= {"torch": "2", "date": "2026-11-26", "commit": "abc"}
    spread = {"selector_ms_p20": 5.5, "selector_ms_p80": 7.5}
    rows = [
        about | {"method": "slow", "selector_ms": 6.5} | spread,
        about | {"method": "quick", "selector_ms": 0.5} | spread,
        about | {"method": "left", "failed": "refused", "reason": "why"},
    ]
    text = load("selection_times").markdown(rows)
    assert text.splitlines()[-1] == "Above 5 ms: `slow` (llava-1.5-7b, eager, 6.5)."
    assert "| left | refused | – | – | – |" in text


def test_every_method_that_chooses_tokens_is_measured(load: Callable[[str], Any]) -> None:
    found = load("selection_times").choosing()
    assert set(found) < set(vtc.methods())
    assert {"vtc_cls", "random", "todre", "flowcut"} <= set(found)
    assert not {"none", "shortv", "naavit"} & set(found)
