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
    (line,) = [line for line in text.splitlines() if line.startswith("| slow | llava-1.5-7b |")]
    assert line == "| slow | llava-1.5-7b | eager | 6.5 | launched one operation at a time |"
    assert "| left | refused | – | – | – |" in text


@pytest.mark.parametrize(
    ("fast", "why"),
    [
        ({"selection": "it reads", "prefill": "cuda"}, "not captured: it reads"),
        (
            {"selection": "cuda", "prefill": "cuda up to layer 6; then it looks"},
            "not captured: it looks",
        ),
        ({"selection": "cuda", "prefill": "cuda"}, "captured whole; the work itself takes"),
    ],
)
def test_why_it_is_slow_is_what_its_report_said(
    load: Callable[[str], Any], fast: dict[str, str], why: str
) -> None:
    row = {"method": "slow", "model": "a", "path": "fast", "selector_ms": 6.5, "fast": fast}
    launched = {"method": "slow", "model": "a", "path": "eager", "selector_ms": 9.5}
    reason = load("selection_times").reason
    assert reason(row, [row, launched]).startswith(why)
    assert reason(launched, [row, launched]).endswith("captured as far as it can be, 6.50 ms")


def test_every_time_above_the_limit_has_its_reason(load: Callable[[str], Any]) -> None:
    script = load("selection_times")
    rows = read(script.RESULTS / "rows.jsonl")
    table = (script.RESULTS / "selection.md").read_text()
    assert table == script.markdown(rows)
    slow = [r for r in rows if r.get("selector_ms", 0) > script.LIMIT_MS]
    assert slow
    for row in slow:
        start = f"| {row['method']} | {row['model']} | {row['path']} | {row['selector_ms']:.1f} | "
        assert start in table


def test_every_method_that_chooses_tokens_is_measured(load: Callable[[str], Any]) -> None:
    found = load("selection_times").choosing()
    assert set(found) < set(vtc.methods())
    assert {"vtc_cls", "random", "todre", "flowcut"} <= set(found)
    assert not {"none", "shortv", "naavit"} & set(found)
