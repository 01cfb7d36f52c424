"""README's table of speed: from rows alone, between its marks, nothing that was not measured."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.benchmarks.made import kernel_row, scale_row, spread, ttft_row
from vtc.bench.rows import read
from vtc.bench.tables import added, speedup

README = "# A\n\n<!-- speed:start -->\nold 9.99×\n<!-- speed:end -->\n\nB\n"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Results as after a run on a GPU, and a README."""
    whole = spread("generate_ms", 4000.0) | {"tpot_ms": 31.0}
    found = {
        "ttft": [
            ttft_row("stock", "eager", 40.0, **whole),
            ttft_row("stock", "fast", 20.0),
            ttft_row("vtc_cls", "eager", 42.0),
            ttft_row("vtc_cls", "fast", 8.0),
        ],
        "kernels": [
            kernel_row("triton", 0.04) | {"graph_ms": 0.03},
            kernel_row("torch", 0.4),
            kernel_row("official", 0.8),
        ],
        "scale": [
            scale_row("stock", "eager", "images", 32, **spread("ttft_ms", 9000.0)),
            scale_row("stock", "eager", "images", 40),
            scale_row("vtc_cls", "fast", "images", 40, **spread("ttft_ms", 300.0)),
        ],
    }
    for name, rows in found.items():
        (tmp_path / name).mkdir()
        (tmp_path / name / "rows.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    (tmp_path / "README.md").write_text(README)
    return tmp_path


def generate(load: Callable[[str], Any], folder: Path, *more: str) -> int:
    given = ["--readme", str(folder / "README.md"), "--results", str(folder), *more]
    return int(load("readme_table").main(given))


def test_the_table_is_written_between_the_marks(load: Callable[[str], Any], folder: Path) -> None:
    assert generate(load, folder, "--check") == 1
    assert (folder / "README.md").read_text() == README
    assert generate(load, folder) == 0
    text = (folder / "README.md").read_text()
    assert text.startswith("# A\n\n<!-- speed:start -->\n") and "9.99" not in text
    assert text.endswith("\n<!-- speed:end -->\n\nB\n")
    assert (
        "| LLaVA-1.5-7B, 576 → 64 | `vtc_cls` | fast | 40.00 | 20.00 | 42.00 | 8.00 (7.20–8.80)"
        in text
    )
    assert "| 5.00× | 2.50× | 12.00 (3.67×, 1.83×) | 2.5 % | 5.0 % |" in text
    assert "| LLaVA-1.5-7B, 576 | `stock` | eager | 4,000 (3,600–4,400) | 31.00 | – | – |" in text
    assert "`compact` | 8 × 2,944 → 640 × 4096 | 0.040 ms | 0.030 ms | 0.400 ms (10.00×)" in text
    assert "stock is out of memory at 40; `vtc_cls` → 160 takes 300 ms and 54.0 GiB for 40" in text
    assert "A GPU" in text and "abc" in text
    assert generate(load, folder, "--check") == 0


def test_what_was_not_measured_is_not_said() -> None:
    row = ttft_row("vtc_cls", "fast", 8.0)
    assert (speedup(row, "eager"), speedup(row, "fast")) == (5.0, 2.5)
    assert speedup(row | {"parity": None}, "eager") is None
    assert speedup(row | {"meaningful": False}, "eager") is None
    assert speedup(row | {"stock": {"eager": {"ttft_ms": 40.0}}}, "fast") is None
    assert speedup(row, "eager", "generate_ms") is None
    assert speedup(ttft_row("stock", "eager", 40.0), "eager") is None
    assert speedup(ttft_row("stock", "fast", 20.0), "eager") == 2.0
    # selection by events, and what the encoder takes longer than the stock model's on this path
    assert added(row) == pytest.approx((0.2 + 2.2 - 2.0) / 8)
    assert added(ttft_row("stock", "fast", 20.0)) is None


def test_rows_from_elsewhere_are_taken_in(load: Callable[[str], Any], folder: Path) -> None:
    new = folder / "new.jsonl"
    rows = [ttft_row("vtc_cls", "fast", 4.0), kernel_row("triton", 0.02)]
    new.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert generate(load, folder, "--add", str(new)) == 0
    kept = read(folder / "ttft" / "rows.jsonl")
    assert len(kept) == 4 and kept[-1]["ttft_ms"] == 4.0
    assert len(read(folder / "kernels" / "rows.jsonl")) == 3
    assert "| 10.00× | 5.00× |" in (folder / "README.md").read_text()


def test_toys_are_refused(
    load: Callable[[str], Any], folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    toys = folder / "toys.jsonl"
    toys.write_text(json.dumps(ttft_row("vtc_cls", "fast", 4.0, meaningful=False)) + "\n")
    assert generate(load, folder, "--add", str(toys)) == 2
    assert "rows of toy shapes" in capsys.readouterr().err
    assert (folder / "README.md").read_text() == README


@pytest.mark.parametrize("text", ["no marks", README + README, "<!-- speed:start --> only"])
def test_a_readme_without_its_marks_is_left_alone(
    load: Callable[[str], Any], folder: Path, text: str
) -> None:
    (folder / "README.md").write_text(text)
    assert generate(load, folder) == 2
    assert (folder / "README.md").read_text() == text


def test_without_rows_nothing_is_written(load: Callable[[str], Any], folder: Path) -> None:
    (folder / "ttft" / "rows.jsonl").unlink()
    assert generate(load, folder) == 2
    assert (folder / "README.md").read_text() == README
