"""The training script: a run ends with a model, the next one goes on where it stopped."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "train_testbed.py"
TOY = ["--small", "--eager", "--batch", "4", "--check-size", "4", "--log-every", "1"]
TOY += ["--device", "cpu", "--reserve", "1", "--warmup", "2"]


def train(out: Path, *options: str) -> list[dict]:
    command = [sys.executable, str(SCRIPT), *TOY, "--out", str(out), *options]
    subprocess.run(command, check=True, capture_output=True, timeout=300)
    return [json.loads(line) for line in (out / "train.jsonl").read_text().splitlines()]


@pytest.mark.slow
def test_a_second_run_goes_on_from_the_first(tmp_path: Path) -> None:
    first = train(tmp_path / "one", "--minutes", "0.4")
    state = json.loads((tmp_path / "one" / "state.json").read_text())
    assert state["step"] >= 1
    tables = {(row["table"], row.get("kept")) for row in first if "table" in row}
    assert {("full", None), ("blank", None), ("cls", 22), ("random", 22)} <= tables
    # a rate of zero moves nothing: what the second run saves is what the first one saved
    second = train(
        tmp_path / "two", "--minutes", "0.4", "--rate", "0", "--resume", str(tmp_path / "one")
    )
    steps = [row["step"] for row in second if "norm" in row]
    assert steps[0] == state["step"] + 1
    one, two = (load_file(tmp_path / n / "model" / "model.safetensors") for n in ("one", "two"))
    assert one.keys() == two.keys()
    assert all(torch.equal(one[name], two[name]) for name in one)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["llava", "qwen2_vl", "internvl"])
def test_the_saved_model_loads_in_the_stock_class(tmp_path: Path, name: str) -> None:
    from transformers import AutoModelForImageTextToText

    beside = [] if name == "llava" else ["--batch", "8", "--pairs", "1", "--clips", "1"]
    rows = train(tmp_path, "--minutes", "0.6", "--family", name, "--stories-from", "0", *beside)
    (full,) = [row for row in rows if row.get("table") == "full"]
    assert ("motion" in full) == (name != "llava")
    _, info = AutoModelForImageTextToText.from_pretrained(
        tmp_path / "model", output_loading_info=True
    )
    assert not any(info.values())
