"""A sweep that is stopped goes on where it was; one that fails reports nothing."""

import json

import pandas as pd
import pytest

from vtc.cli import main
from vtc.errors import SampleError
from vtc.evaluation import fingerprint
from vtc.evaluation import sweep as module
from vtc.evaluation.model import Vtc

pytestmark = pytest.mark.eval

CELLS = 6
TIMES = ["encoder_ms", "selector_ms", "ttft_ms", "tpot_ms"]
TIMES += ["ttft_ratio", "ttft_ratio_p20", "ttft_ratio_p80"]
FIGURES = ("accuracy", "accuracy_active", "accuracy_time")
OUTPUTS = {"table.csv", "table.json", "report.html"}
OUTPUTS |= {f"{name}.{ending}" for name in FIGURES for ending in ("png", "svg")}


def written(out):
    return {path.name for path in out.iterdir() if path.is_file()}


def finished(out):
    return sorted((out / "cells").glob("*.json"))


@pytest.fixture
def runs(monkeypatch):
    """The labels of the cells that were run; `stop` may hold after how many it is interrupted."""

    class Runs(list):
        stop = None

    runs, stock = Runs(), module.evaluate

    def count(model, *arguments):
        if runs.stop is not None and len(runs) == runs.stop:
            raise KeyboardInterrupt
        runs.append(model.compression.label)
        return stock(model, *arguments)

    monkeypatch.setattr(module, "evaluate", count)
    return runs


@pytest.fixture(scope="module")
def uninterrupted(sweep, tmp_path_factory):
    return sweep(tmp_path_factory.mktemp("uninterrupted") / "out")


def without_times(out):
    return pd.read_csv(out / "table.csv").drop(columns=TIMES)


def test_an_interrupted_sweep_goes_on_and_ends_the_same(sweep, uninterrupted, tmp_path, runs):
    out = tmp_path / "out"
    runs.stop = 2
    with pytest.raises(KeyboardInterrupt):
        sweep(out)
    assert runs == ["none", "vtc_cls"] and len(finished(out)) == 2
    assert written(out) == set()

    runs.stop = None
    sweep(out)
    assert runs == ["none", "vtc_cls", "random", "uniform", "average_pool", "downsample"]
    assert written(out) == OUTPUTS
    pd.testing.assert_frame_equal(without_times(out), without_times(uninterrupted.out))

    # with every cell there, nothing runs and not a byte changes, times included
    before = {name: (out / name).read_bytes() for name in OUTPUTS - {"report.html"}}
    sweep(out)
    assert len(runs) == CELLS
    assert {name: (out / name).read_bytes() for name in before} == before


def test_another_fingerprint_runs_everything_again(sweep, tmp_path, runs, monkeypatch):
    out = tmp_path / "out"
    sweep(out, questions=2)
    assert len(runs) == CELLS
    monkeypatch.setattr(fingerprint, "_code", lambda: "changed")
    sweep(out, questions=2)
    assert runs[CELLS:] == runs[:CELLS]
    sweep(out, questions=2)
    assert len(runs) == 2 * CELLS


def test_only_damaged_and_new_cells_are_run(sweep, tmp_path, runs):
    out = tmp_path / "out"
    sweep(out, questions=2)
    half = next((out / "cells").glob("uniform-*.samples.jsonl"))
    half.write_bytes(half.read_bytes()[:-20])
    next((out / "cells").glob("random-*.json")).unlink()
    sweep(out, questions=2)
    assert runs[CELLS:] == ["random", "uniform"]
    # another budget is new for all but the full model
    sweep(out, questions=2, keeps=(0.11, 0.5))
    assert "none" not in runs[CELLS:] and len(runs) == CELLS + 2 + CELLS - 1


def test_a_failed_sample_ends_the_sweep_without_a_report(broken_tasks, tmp_path, capfd, model_name):
    out = tmp_path / "out"
    arguments = ["sweep", "--model", model_name, "--out", str(out), "--questions", "8"]
    assert main([*arguments, "--include-path", str(broken_tasks), "--device", "cpu"]) == 1
    captured = capfd.readouterr()
    line = captured.err.splitlines()[-1]
    assert line.startswith("vtc: error: cell none: 1 of 8 samples failed, so no accuracy is")
    assert "question 3 of vtc_scenes: ValueError" in line
    assert captured.out == "" and "Traceback" not in captured.err
    assert not out.exists()


def test_a_failure_in_a_later_cell_keeps_the_finished_ones(sweep, tmp_path, runs, monkeypatch):
    stock = Vtc._generate

    def fail(self, prompts, *arguments):
        if self.compression.method == "uniform" and len(prompts) > 1:
            raise RuntimeError("no memory left")
        return stock(self, prompts, *arguments)

    out = tmp_path / "out"
    monkeypatch.setattr(Vtc, "_generate", fail)
    # the first is timed alone, and is not counted as failed
    with pytest.raises(SampleError, match=r"cell uniform keep=0.11 keep: 7 of 8 samples failed"):
        sweep(out)
    assert len(finished(out)) == 3 and written(out) == set()

    monkeypatch.setattr(Vtc, "_generate", stock)
    sweep(out)
    assert runs[-3:] == ["uniform", "average_pool", "downsample"] and len(runs) == CELLS + 1


@pytest.mark.parametrize("where", ["a file", "/proc/vtc-sweep"])
def test_a_folder_that_takes_no_files_is_refused_first(
    where, tmp_path, capfd, model_name, monkeypatch
):
    monkeypatch.setattr(module, "load", None)
    (tmp_path / "a file").write_text("mine")
    out = str(tmp_path / where)
    assert main(["sweep", "--model", model_name, "--out", out]) == 1
    (line,) = capfd.readouterr().err.splitlines()
    assert line.startswith(f"vtc: error: out={out!r} cannot be written (")
    assert [path.name for path in tmp_path.iterdir()] == ["a file"]


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (["--methods", "nope"], "method 'nope' is unknown; expected one of"),
        (["--tasks", "nope"], "task 'nope' is unknown; expected one of vtc_"),
        (["--methods", "vtc_cls:start=30"], "leaves no block on this encoder"),
    ],
)
def test_wrong_use_runs_nothing(wrong, message, tmp_path, capfd, model_name, tasks_folder, runs):
    out = tmp_path / "out"
    arguments = ["sweep", "--model", model_name, "--out", str(out), "--device", "cpu"]
    assert main([*arguments, "--include-path", str(tasks_folder), *wrong]) == 2
    line = capfd.readouterr().err.splitlines()[-1]
    assert line.startswith("vtc: error: ") and message in line
    assert runs == [] and not out.exists()


def test_the_command_prints_the_table_or_json(
    uninterrupted, tmp_path, capfd, model_name, tasks_folder
):
    out = tmp_path / "out"
    arguments = ["sweep", "--model", model_name, "--out", str(out), "--questions", "2"]
    arguments += ["--include-path", str(tasks_folder), "--keep", "5tok", "--seeds", "0"]
    arguments += ["--positions", "keep", "--pictures", "0", "--device", "cpu"]
    assert main([*arguments, "--json"]) == 0
    found = json.loads(capfd.readouterr().out)
    assert [row["keep"] for row in found["rows"]] == ["1.0", *["5tok"] * 5]
    assert found["report"] == str(out / "report.html")
    assert main(arguments) == 0
    printed = capfd.readouterr().out
    assert "vtc_scenes, 2 questions" in printed and f"report  {out / 'report.html'}" in printed
