"""The benchmark of scale on toy models: points, memory that ends, the gate."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from vtc.bench import gate, scale
from vtc.bench.providers import Provider
from vtc.bench.rows import Row, Store, key, read
from vtc.bench.scale import Settings

NOTHING = {"gpu": None, "cpu": "x"}


def test_rows_are_points(load: Callable[[str], Any], tmp_path: Path) -> None:
    given = ["--tiny", "--points", "1,3", "--runs", "2", "--out", str(tmp_path)]
    assert load("scale").main([*given, "--paths", "fast"]) == 0
    rows = read(tmp_path / "rows.jsonl")
    assert len({key(row) for row in rows}) == len(rows) == 8
    for axis in ("images", "batch"):
        own = [row for row in rows if row["axis"] == axis]
        assert [row[axis] for row in own] == [1, 1, 3, 3]
        other = "batch" if axis == "images" else "images"
        assert all(row[other] == 1 for row in own)
        assert [(row["method"], row["path"]) for row in own[:2]] == [
            ("stock", "eager"),
            ("vtc_cls", "fast"),
        ]
    for row in rows:
        assert row["ttft_ms_p20"] <= row["ttft_ms"] <= row["ttft_ms_p80"] and row["runs"] == 2
    assert rows[1]["fast"] and rows[1]["keep"] == 2


class Full:
    """A model that has memory for so many images of the stock model, and for all others."""

    def __init__(self, most: int) -> None:
        self.most, self.tried = most, list[tuple[str, int]]()

    def __call__(self, provider: Provider, point: int, runs: int) -> Row:
        self.tried.append((provider.method, point))
        if provider.method == "stock" and point > self.most:
            raise torch.cuda.OutOfMemoryError("tried to allocate")
        return {"ttft_ms": 1.0, "runs": runs}


@pytest.mark.parametrize("most", [3, 30])
def test_memory_that_ends_is_a_row_and_the_last_try(
    monkeypatch: pytest.MonkeyPatch, most: int
) -> None:
    full = Full(most)
    monkeypatch.setattr(
        scale._Curve, "_measured", lambda self, provider, point, runs: full(provider, point, runs)
    )
    settings = Settings(
        "cpu", axes=("images",), points=(1, 2, 4, 8), paths=("eager",), beyond=(), tiny=True
    )
    store = Store(None, NOTHING)
    assert scale.run(settings, store)
    stock = [row for row in store.added if row["method"] == "stock"]
    over = [row for row in stock if row.get("failed") == "out of memory"]
    assert [row["images"] for row in over] == ([4] if most == 3 else [])
    assert ("stock", 8) in full.tried if most == 30 else ("stock", 8) not in full.tried
    assert [point for method, point in full.tried if method == "vtc_cls"] == [1, 2, 4, 8]
    if over:
        assert over[0]["where"] and "ttft_ms" not in over[0]


def test_a_red_fast_path_has_no_point(monkeypatch: pytest.MonkeyPatch) -> None:
    red = gate.Parity(1.0, 0.1, 0.0, 0.1, True)
    monkeypatch.setattr(gate, "parity", lambda *_: red)
    store = Store(None, NOTHING)
    settings = Settings("cpu", axes=("batch",), points=(1,), runs=1, beyond=(), tiny=True)
    assert not scale.run(settings, store)
    assert [(row["method"], row["path"]) for row in store.added] == [
        ("stock", "eager"),
        ("vtc_cls", "eager"),
    ]
