"""A sweep that is stopped goes on where it was; one that fails reports nothing."""

import errno
import json
import os
import shutil
import subprocess
import sys
from types import SimpleNamespace

import pandas as pd
import pytest

from vtc.cli import main
from vtc.errors import InputError, OptionError, SampleError, SignalError, VtcError
from vtc.evaluation import answering, fingerprint, sections, store
from vtc.evaluation.answering import Answering
from vtc.evaluation.compression import Compression
from vtc.evaluation.figures import Chart
from vtc.evaluation.kept import Kept
from vtc.evaluation.model import Vtc

pytestmark = pytest.mark.eval

CELLS = 6
TEXT = {"capture_output": True, "text": True, "check": True}
OUTPUTS = {"table.csv", "table.json", "report.html"}


def written(out):
    return {path.name for path in out.iterdir() if path.is_file()}


def finished(out):
    return sorted((out / "cells").glob("*.json"))


@pytest.fixture
def runs(monkeypatch):
    """The labels of the cells that were run; `stop` may hold after how many it is interrupted."""

    class Runs(list):
        stop = None

    runs, stock = Runs(), answering.evaluate

    def count(model, *arguments):
        if runs.stop is not None and len(runs) == runs.stop:
            raise KeyboardInterrupt
        runs.append(model.compression.label)
        return stock(model, *arguments)

    monkeypatch.setattr(answering, "evaluate", count)
    return runs


@pytest.fixture
def bare(monkeypatch):
    """Sweeps without what has tests of its own: the check of blindness, and drawn figures."""
    monkeypatch.setattr(Answering, "check_blind", lambda *_: [])
    monkeypatch.setattr(Chart, "sheet", lambda _: {})
    monkeypatch.setattr(sections, "_plots", lambda *_: [])


@pytest.fixture(scope="module")
def uninterrupted(sweep, tmp_path_factory):
    return sweep(tmp_path_factory.mktemp("uninterrupted") / "out")


def without_times(out):
    found = pd.read_csv(out / "table.csv")
    return found.drop(columns=[name for name in found if "_ms" in name or "ttft" in name])


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
    assert written(out) >= OUTPUTS
    pd.testing.assert_frame_equal(without_times(out), without_times(uninterrupted.out))

    # with every cell there, nothing runs and not a byte changes, times included
    before = {name: (out / name).read_bytes() for name in ("table.csv", "table.json")}
    sweep(out)
    assert len(runs) == CELLS
    assert {name: (out / name).read_bytes() for name in before} == before


@pytest.mark.usefixtures("bare")
def test_another_fingerprint_runs_everything_again(sweep, tmp_path, runs, monkeypatch):
    out = tmp_path / "out"
    given = {"questions": 2, "timed_samples": 0}
    sweep(out, **given)
    assert len(runs) == CELLS
    monkeypatch.setattr(fingerprint, "_code", lambda: "changed")
    sweep(out, **given)
    assert runs[CELLS:] == runs[:CELLS]
    sweep(out, **given)
    assert len(runs) == 2 * CELLS


@pytest.mark.usefixtures("bare")
def test_only_damaged_and_new_cells_are_run(sweep, tmp_path, runs):
    out, given = tmp_path / "out", {"questions": 2, "timed_samples": 0}
    sweep(out, **given)
    for name in ("*-uniform-*.samples.jsonl", "*-downsample-*.kept.npz"):
        half = next((out / "cells").glob(name))
        half.write_bytes(half.read_bytes()[:-20])
    next((out / "cells").glob("*-random-*.json")).unlink()
    sweep(out, **given)
    assert runs[CELLS:] == ["random", "uniform", "downsample"]
    # another budget is new for all but the full model
    sweep(out, keeps=(0.11, 0.5), **given)
    assert "none" not in runs[CELLS:] and len(runs) == CELLS + 3 + CELLS - 1


def test_a_failed_sample_ends_the_sweep_without_a_report(broken_tasks, tmp_path, capfd, model_name):
    out = tmp_path / "out"
    arguments = ["sweep", "--model", model_name, "--out", str(out), "--questions", "8"]
    arguments += ["--workers", "1"]
    assert main([*arguments, "--include-path", str(broken_tasks), "--device", "cpu"]) == 1
    captured = capfd.readouterr()
    line = captured.err.splitlines()[-1]
    assert line.startswith(
        "vtc: error: cell llava vtc_scenes none: 1 of 8 samples failed, so no accuracy is"
    )
    assert "question 3 of vtc_scenes: ValueError" in line
    assert captured.out == "" and "Traceback" not in captured.err
    assert not out.exists()


@pytest.mark.usefixtures("bare")
def test_a_failure_in_a_later_cell_keeps_the_finished_ones(sweep, tmp_path, runs, monkeypatch):
    stock = Vtc._generate

    def fail(self, prompts, *arguments):
        if self.compression.method == "uniform" and len(prompts) > 1:
            raise RuntimeError("no memory left")
        return stock(self, prompts, *arguments)

    out = tmp_path / "out"
    monkeypatch.setattr(Vtc, "_generate", fail)
    message = r"cell llava vtc_scenes uniform keep=0.11 keep: 8 of 8 samples failed"
    with pytest.raises(SampleError, match=message):
        sweep(out)
    assert len(finished(out)) == 3 and written(out) == set()

    monkeypatch.setattr(Vtc, "_generate", stock)
    sweep(out)
    assert runs[-3:] == ["uniform", "average_pool", "downsample"] and len(runs) == CELLS + 1


@pytest.mark.parametrize("where", ["a file", "/proc/vtc-sweep"])
def test_a_folder_that_takes_no_files_is_refused_first(
    where, tmp_path, capfd, model_name, monkeypatch
):
    monkeypatch.setattr("vtc.evaluation.models.load", None)
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
        # all tasks of lmms-eval are looked through, as in test_evaluate.py
        pytest.param(
            ["--tasks", "nope"],
            "task 'nope' is unknown; expected one of vtc_",
            marks=pytest.mark.slow,
        ),
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
    arguments += ["--positions", "keep", "--pictures", "0", "--device", "cpu", "--workers", "1"]
    assert main([*arguments, "--json"]) == 0
    found = json.loads(capfd.readouterr().out)
    assert [row["keep"] for row in found["rows"]] == ["1.0", *["5tok"] * 5]
    assert found["report"] == str(out / "report.html")
    assert found["samples"] == str(out / "cells")
    assert main(arguments) == 0
    printed = capfd.readouterr().out
    assert "vtc_scenes" in printed and f"report  {out / 'report.html'}" in printed
    assert f"table   {out / 'table.csv'}" in printed and f"samples {out / 'cells'}" in printed


@pytest.mark.parametrize(
    "number", [errno.ENOSPC, pytest.param(errno.EROFS, marks=pytest.mark.slow)]
)
def test_a_disk_that_takes_no_more_loses_no_finished_cell(
    sweep, uninterrupted, tmp_path, runs, monkeypatch, number
):
    out, stock, left = tmp_path / "out", os.fsync, [8]

    def fail_later(descriptor):
        left[0] -= 1
        if left[0] < 0:
            raise OSError(number, os.strerror(number))
        stock(descriptor)

    monkeypatch.setattr(store.os, "fsync", fail_later)
    message = rf"could not be written \({os.strerror(number)}\), .*make room and run the same again"
    with pytest.raises(VtcError, match=message):
        sweep(out)
    monkeypatch.undo()
    finished_before = {path.name: path.read_bytes() for path in finished(out)}
    assert finished_before and written(out) == set()
    assert not list((out / "cells").glob(".*"))

    sweep(out)
    for name, content in finished_before.items():
        assert (out / "cells" / name).read_bytes() == content
    pd.testing.assert_frame_equal(without_times(out), without_times(uninterrupted.out))


def test_what_was_kept_lies_beside_the_samples(uninterrupted):
    frame = uninterrupted.samples
    for cell, samples in frame.groupby("cell"):
        kept = Kept.read(uninterrupted.out / "cells" / f"{cell}.kept.npz")
        for line, sample in enumerate(samples.to_dict("records")):
            (left,) = kept[line]
            assert left.grid == (1, 14, 14) and len(left.kept) == sample["visual_tokens"]
            if sample["method"] in ("average_pool", "downsample"):
                assert not left.kept.any() and left.covered.all()
            else:
                assert left.kept.sum() == left.covered.sum() == sample["llm_tokens"]
        size = (uninterrupted.out / "cells" / f"{cell}.kept.npz").stat().st_size
        assert size < 4096


@pytest.mark.usefixtures("bare")
def test_a_task_without_questions_is_left_out_and_said(sweep, tasks_folder, tmp_path, monkeypatch):
    monkeypatch.setattr("tenacity.nap.time", SimpleNamespace(sleep=lambda seconds: None))
    folder = tmp_path / "tasks"
    shutil.copytree(tasks_folder, folder)
    (folder / "vtc_captions.parquet").unlink()
    given = {"include_path": folder, "questions": 2, "timed_samples": 0}
    result = sweep(tmp_path / "out", tasks=("vtc_captions", "vtc_scenes"), **given)
    assert {row["task"] for row in result.rows} == {"vtc_scenes"}
    (note,) = result.notes
    assert note.startswith("vtc_captions: not run, because the questions of vtc_captions could not")
    with pytest.raises(InputError, match="the questions of vtc_captions could not be loaded"):
        sweep(tmp_path / "none", tasks=("vtc_captions",), **given)


@pytest.mark.usefixtures("bare")
def test_answers_outlive_their_questions(sweep, tasks_folder, tmp_path, runs, monkeypatch):
    monkeypatch.setattr("tenacity.nap.time", SimpleNamespace(sleep=lambda seconds: None))
    # as of a task that reads the hub: the questions are no part of the folder
    data = shutil.copy(tasks_folder / "vtc_scenes.parquet", tmp_path)
    folder = shutil.copytree(tasks_folder, tmp_path / "tasks")
    file = folder / "vtc_scenes.yaml"
    file.write_text(file.read_text().replace("vtc_scenes.parquet", data))
    (folder / "vtc_scenes.parquet").unlink()
    given = {"include_path": folder, "questions": 2, "timed_samples": 0, "pictures": 1}
    before = sweep(tmp_path / "out", **given)
    assert before.notes == () and len(runs) == CELLS
    os.unlink(data)
    after = sweep(tmp_path / "out", **given)
    assert after.rows == before.rows and len(runs) == CELLS
    (note,) = after.notes
    assert note.startswith("vtc_scenes: no pictures, because the questions of vtc_scenes could not")


@pytest.mark.usefixtures("bare")
def test_no_question_counts_twice(sweep, tasks_folder, tmp_path, runs):
    folder = shutil.copytree(tasks_folder, tmp_path / "tasks")
    (folder / "both.yaml").write_text("group: both\ntask: [vtc_scenes, vtc_captions]\n")
    given = {"include_path": folder, "questions": 2, "timed_samples": 0, "workers": 1}
    result = sweep(tmp_path / "out", tasks=("vtc_scenes", "vtc_scenes"), **given)
    assert [row["n"] for row in result.rows] == [2] * CELLS and len(runs) == CELLS
    assert len(result.samples) == 2 * CELLS
    message = "tasks: 'vtc_scenes' is asked for by 'vtc_scenes' and by 'both', expected once"
    # whether or not they are answered already
    with pytest.raises(OptionError, match=message):
        sweep(tmp_path / "out", tasks=("vtc_scenes", "both"), **given)
    sweep(tmp_path / "out", tasks=("both",), **given)
    with pytest.raises(OptionError, match=message):
        sweep(tmp_path / "out", tasks=("vtc_scenes", "both"), **given)


@pytest.mark.usefixtures("bare")
def test_what_was_written_by_half_is_gone_after_the_next_run(sweep, tmp_path):
    ended = subprocess.run([sys.executable, "-c", "import os; print(os.getpid())"], **TEXT).stdout
    out = tmp_path / "out"
    halves = [out / at / f".a.json.{ended.strip()}.partial" for at in ("cells", "times", ".")]
    for half in halves:
        half.parent.mkdir(parents=True, exist_ok=True)
        half.touch()
    sweep(out, questions=2)
    assert not any(half.exists() for half in halves)


@pytest.mark.usefixtures("bare")
def test_what_one_of_several_models_refuses_is_a_note(sweep, tmp_path, monkeypatch):
    stock = Compression.patch

    def patch(self, model):
        on_qwen = "qwen2" in model.config.model_type
        if self.options or (on_qwen and self.method == "vtc_cls"):
            raise SignalError("method 'vtc_cls' needs a [CLS] token")
        return stock(self, model)

    monkeypatch.setattr(Compression, "patch", patch)
    given = {"models": ("qwen2_vl", "llava"), "questions": 2, "timed_samples": 0}
    result = sweep(tmp_path / "out", **given)
    assert result.notes == (
        "qwen2_vl: vtc_cls not run, because method 'vtc_cls' needs a [CLS] token",
    )
    run = [(row["model"], row["method"]) for row in result.rows]
    assert ("llava", "vtc_cls") in run and ("qwen2_vl", "vtc_cls") not in run
    assert len(run) == 2 * CELLS - 1
    with pytest.raises(SignalError):
        sweep(tmp_path / "refused", methods=("vtc_cls:start=2", "vtc_cls"), **given)


def test_workers_answer_as_one_process(sweep, uninterrupted, tmp_path):
    out = tmp_path / "out"
    sweep(out, workers=2)
    pd.testing.assert_frame_equal(without_times(out), without_times(uninterrupted.out))
    assert json.loads((out / "table.json").read_text())["environment"]["workers"] == "2"


@pytest.mark.usefixtures("bare")
def test_a_failure_in_a_worker_is_the_same_error(sweep, broken_tasks, tmp_path):
    message = r"cell llava vtc_scenes \w+.*: 1 of 8 samples failed.* question 3 of vtc_scenes"
    with pytest.raises(SampleError, match=message):
        sweep(tmp_path / "out", workers=2, include_path=broken_tasks)


@pytest.mark.parametrize("batch_size", [pytest.param(1, marks=pytest.mark.slow), 2])
@pytest.mark.usefixtures("bare")
def test_questions_that_were_not_timed_have_no_times(sweep, tmp_path, batch_size):
    # with batches of two, the third is alone in its call
    given = {"questions": 3, "batch_size": batch_size}
    timed = sweep(tmp_path / "out", timed_samples=1, **given).samples
    assert {i: own.notna().all() for i, own in timed.groupby("doc_id")["ttft_ms"]} == {
        0: True,
        1: False,
        2: False,
    }
    assert sweep(tmp_path / "out", timed_samples=0, **given).samples["kv_bytes"].isna().all()
