"""A sweep that is killed at any moment goes on, leaves no process behind, and ends the same."""

import os
import random
import signal
import subprocess
import sys
import time

import pandas as pd
import pytest

# five starts of a sweep, beside whatever else two cores do
pytestmark = [pytest.mark.eval, pytest.mark.slow, pytest.mark.timeout(1800)]

SETTINGS = ["--methods", "vtc_cls", "flowcut", "--keep", "0.11", "--positions", "keep"]
SETTINGS += ["--questions", "8", "--seeds", "0", "--batch-size", "8", "--timed-samples", "1"]
SETTINGS += ["--pictures", "0", "--device", "cpu"]
CELLS = 7


def without_times(out):
    found = pd.read_csv(out / "table.csv")
    return found.drop(columns=[name for name in found if "_ms" in name or "ttft" in name])


def finished(out):
    return len([*(out / "cells").glob("*.json"), *(out / "times").glob("*.json")])


def processes(group):
    """Those of a process group that are there and not only waiting to be collected."""
    found = subprocess.run(
        ["ps", "-e", "-o", "pgid=,stat="], capture_output=True, text=True, check=True
    )
    states = [line.split() for line in found.stdout.splitlines()]
    return sum(int(pgid) == group and not state.startswith("Z") for pgid, state in states)


def gone(group, seconds=60.0):
    end = time.monotonic() + seconds
    while processes(group) and time.monotonic() < end:
        time.sleep(0.2)
    return not processes(group)


@pytest.mark.parametrize(("workers", "seed"), [(1, 0), (2, 1)])
def test_killed_three_times(sweep, model_name, tasks_folder, tmp_path, workers, seed):
    draw, out = random.Random(seed), tmp_path / "out"
    arguments = ["sweep", "--model", model_name, "--include-path", str(tasks_folder)]
    arguments += [*SETTINGS, "--workers", str(workers), "--out", str(out)]
    start = "import sys; from vtc.cli import main; sys.exit(main(sys.argv[1:]))"
    for _ in range(3):
        before = finished(out)
        with (tmp_path / "said").open("wb") as said:
            process = subprocess.Popen(
                [sys.executable, "-c", start, *arguments],
                stdout=said,
                stderr=said,
                start_new_session=True,
                env={**os.environ, "HF_HUB_OFFLINE": "1"},
            )
        # somewhere behind the next one or two finished parts
        more = draw.randint(1, 2)
        while finished(out) < min(before + more, 2 * CELLS - 1) and process.poll() is None:
            time.sleep(0.01)
        time.sleep(draw.uniform(0, 0.5))
        process.send_signal(signal.SIGKILL)
        # or it failed, or was done before it could be killed
        assert process.wait() == -signal.SIGKILL, (tmp_path / "said").read_text()[-2000:]
        assert gone(process.pid), "a worker outlived its sweep"
    assert finished(out) >= 3

    # with every part that is there taken as it is
    there = {path: path.read_bytes() for path in out.glob("*/*.json")}
    given = {"methods": ("vtc_cls", "flowcut")}
    sweep(out, workers=workers, **given)
    assert all(path.read_bytes() == content for path, content in there.items())
    assert not list(out.glob("*/.*.partial"))
    sweep(tmp_path / "whole", **given)
    pd.testing.assert_frame_equal(without_times(out), without_times(tmp_path / "whole"))
    for file in (tmp_path / "whole" / "cells").iterdir():
        if file.suffix != ".json":
            assert file.read_bytes() == (out / "cells" / file.name).read_bytes()
