"""Processes of a torchrun share the questions of each cell, and come to the same table as one."""

import os
import subprocess
import sys
from types import SimpleNamespace

import pandas as pd
import pytest

from vtc.errors import VtcError
from vtc.evaluation import distributed

pytestmark = pytest.mark.eval

SETTINGS = ["--keep", "0.11", "--positions", "keep", "--questions", "7", "--seeds", "0"]
SETTINGS += ["--batch-size", "2", "--timed-samples", "1", "--pictures", "0", "--device", "cpu"]


def torchrun(*arguments):
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2"]
    command += ["--master-port", "0", "--rdzv-backend", "c10d", "--rdzv-endpoint", "localhost:0"]
    env = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    return subprocess.run([*command, *arguments], env=env, capture_output=True, text=True)


def without_times(out):
    found = pd.read_csv(out / "table.csv")
    return found.drop(columns=[name for name in found if "_ms" in name or "ttft" in name])


@pytest.mark.slow
def test_two_processes_end_as_one(sweep, model_name, tasks_folder, tmp_path):
    out = tmp_path / "out"
    arguments = ["--model", model_name, "--include-path", str(tasks_folder), "--out", str(out)]
    done = torchrun("-m", "vtc", "sweep", *arguments, *SETTINGS)
    assert done.returncode == 0, done.stderr[-3000:]
    # one of them prints
    assert done.stdout.count(f"report  {out / 'report.html'}") == 1
    sweep(tmp_path / "one", questions=7, batch_size=2)
    pd.testing.assert_frame_equal(without_times(out), without_times(tmp_path / "one"))
    samples = [path.read_bytes().count(b"\n") for path in out.glob("cells/*.samples.jsonl")]
    assert samples == [7] * 6


def test_without_torchrun_this_process_is_all(monkeypatch):
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    distributed.start()
    distributed.wait()
    with distributed.first_before_others():
        pass
    assert distributed.size() == 1 and distributed.is_first()
    assert distributed.agreed([1, 2]) == [1, 2] == distributed.share([1, 2])


def test_shares_are_everything_once(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "3")
    found = []
    for rank in range(3):
        monkeypatch.setenv("RANK", str(rank))
        found += distributed.share(range(10))
        assert distributed.is_first() == (rank == 0)
    assert sorted(found) == list(range(10))


def test_a_process_that_did_not_join_is_an_error(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "3")
    monkeypatch.setattr("accelerate.PartialState", lambda cpu: SimpleNamespace(num_processes=1))
    with pytest.raises(VtcError, match="torchrun started 3 processes and 1 joined"):
        distributed.start()
