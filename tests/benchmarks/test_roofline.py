"""Pictures of rows: drawn from them alone, the same rows give the same bytes."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.benchmarks.made import Row, kernel_row, scale_row, spread, ttft_row


def rows() -> dict[str, list[Row]]:
    cut = {"block_patches": [576] * 12 + [300] * 10 + [64] * 2}
    blocks = {"block_ms": [0.3] * 24}
    return {
        "ttft": [
            ttft_row("stock", "eager", 40.0, **blocks),
            ttft_row("stock", "fast", 20.0, tpot_ms=5.0),
            ttft_row("vtc_cls", "fast", 8.0),
            ttft_row("flowcut", "eager", 60.0, **cut, **blocks),
            ttft_row("downsample", "eager", 30.0, **blocks),
            {**ttft_row("todre", "fast", 8.0), "failed": "refused", "reason": "none"},
        ],
        "kernels": [kernel_row("triton", 0.04), kernel_row("official", 0.8)],
        "scale": [
            scale_row("stock", "eager", axis, point, **spread("ttft_ms", 90.0 * point))
            for axis in ("images", "batch")
            for point in (1, 2)
        ]
        + [scale_row("stock", "eager", "images", 4)]
        + [
            scale_row("vtc_cls", "fast", "images", point, **spread("ttft_ms", 10.0 * point))
            for point in (1, 2, 4)
        ],
    }


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name, found in rows().items():
        (tmp_path / name).mkdir()
        (tmp_path / name / "rows.jsonl").write_text("".join(json.dumps(r) + "\n" for r in found))
    return tmp_path


def test_every_picture_is_drawn(load: Callable[[str], Any], folder: Path) -> None:
    script = load("roofline")
    assert script.main(["--rows", str(folder), "--plot"]) == 0
    names = ("parts", "roofline", "encoder_blocks", "kernels", "scale")
    for name in names:
        assert (folder / "roofline" / f"{name}.png").stat().st_size > 10_000
        assert (folder / "roofline" / f"{name}.svg").read_text().startswith("<?xml")
    table = (folder / "roofline" / "parts.md").read_text()
    assert table.count("\n") == 2 + len(rows()["ttft"])
    again = load("figures.operations").kernel_plot(rows()["kernels"])
    assert again["png"] == (folder / "roofline" / "kernels.png").read_bytes()
    assert again["svg"] == (folder / "roofline" / "kernels.svg").read_bytes()


def test_parts_add_up_to_the_time(load: Callable[[str], Any]) -> None:
    parts = load("figures.parts")
    for row in rows()["ttft"]:
        assert sum(parts._times(row).values()) == pytest.approx(row["ttft_ms"])
    steps = {"score_ms": 0.05, "select_ms": 0.05, "gather_ms": 0.04}
    row = ttft_row("vtc_cls", "eager", 42.0, **steps)
    assert parts._times(row)["selection"] == pytest.approx(0.2 - 0.14)
    assert sum(parts._times(row).values()) == pytest.approx(42.0)


def test_the_smallest_budget_of_each_method_is_shown(load: Callable[[str], Any]) -> None:
    parts = load("figures.parts")
    given = [ttft_row("stock", "eager", 40.0), ttft_row("vtc_cls", "fast", 8.0)]
    given.append(ttft_row("vtc_cls", "fast", 9.0, keep=192))
    ((_, shown),) = parts.chosen(given).items()
    assert [row["keep"] for row in shown] == [None, 64]


def test_patches_of_each_block(load: Callable[[str], Any]) -> None:
    blocks = load("figures.blocks")
    shape = blocks.shape_of("llava-1.5-7b")
    found = {row["method"]: blocks.patches(row, shape, 1) for row in rows()["ttft"]}
    assert found["stock"] == [577.0] * 24
    assert found["flowcut"][12] == 300.0
    assert found["downsample"] == pytest.approx([577 * 64 / 576] * 24)


def test_without_rows_there_is_nothing_to_draw(
    load: Callable[[str], Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert load("roofline").main(["--rows", str(tmp_path), "--plot"]) == 2
    assert "no rows under" in capsys.readouterr().err
