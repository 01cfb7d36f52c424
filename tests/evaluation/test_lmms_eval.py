"""The stock `lmms-eval` command, from a shell outside the repository, without a network."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.eval

# every process of the shell loads this at its start: a look-up or a connection is written down
NO_NETWORK = """
import os, socket

def refuse(self_or_host, *arguments, **named):
    if getattr(self_or_host, "family", None) == socket.AF_UNIX:
        return connect(self_or_host, *arguments, **named)
    with open(os.environ["NETWORK_LOG"], "a") as log:
        log.write(f"{self_or_host} {arguments}\\n")
    raise OSError("no network in this test")

connect = socket.socket.connect
socket.socket.connect = socket.socket.connect_ex = socket.getaddrinfo = refuse
"""


@pytest.fixture(scope="module")
def shell(tmp_path_factory):
    """Runs a line of bash in an empty folder; gives the folder and the finished process."""
    home = tmp_path_factory.mktemp("home")
    (home / "sitecustomize.py").write_text(NO_NETWORK)
    log = home / "network.log"

    def run(line):
        folder = tmp_path_factory.mktemp("shell")
        paths = [str(home), *filter(None, [os.environ.get("PYTHONPATH")])]
        env = os.environ | {
            "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
            "PYTHONPATH": os.pathsep.join(paths),
            "NETWORK_LOG": str(log),
            "HF_HUB_OFFLINE": "1",
            "HF_HOME": str(home / "huggingface"),
            "XDG_CACHE_HOME": str(home / "cache"),
        }
        done = subprocess.run(
            ["bash", "-euo", "pipefail", "-c", line],
            cwd=folder,
            env=env,
            capture_output=True,
            text=True,
        )
        return folder, done

    yield run
    assert not log.exists(), log.read_text()


def read_lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def evaluated(shell, model_name, arguments, tasks, include='"$(vtc tasks --questions 16)"'):
    """What lmms-eval wrote: its results, and the samples of each task."""
    folder, done = shell(
        f"lmms-eval --model vtc --model_args pretrained={model_name},device=cpu,{arguments} "
        f"--tasks {tasks} --include_path {include} --limit 8 --log_samples --output_path out"
    )
    # not even its exit status says whether it failed
    assert done.returncode == 0, done.stderr
    results = list(folder.rglob("*_results.json"))
    if not results:
        assert not list(folder.rglob("*.jsonl"))
        return done, None, None
    samples = {
        task: read_lines(next(folder.rglob(f"*_samples_{task}.jsonl"))) for task in tasks.split(",")
    }
    return done, json.loads(results[0].read_text()), samples


def test_with_compression(shell, model_name):
    tasks = "vtc_scenes,vtc_scenes_blank,vtc_captions"
    done, results, samples = evaluated(shell, model_name, "method=vtc_cls,keep=0.11", tasks)
    assert results is not None, done.stderr
    scenes = results["results"]["vtc_scenes"]
    assert scenes["accuracy,none"] == sum(s["accuracy"] for s in samples["vtc_scenes"]) / 8
    kinds = {"existence", "color", "shape", "count", "where", "relation", "number", "digit"}
    for kind in kinds:
        (own,) = [s for s in samples["vtc_scenes"] if f"accuracy_{kind}" in s]
        assert scenes[f"accuracy_{kind},none"] == own["accuracy"]
    blank = results["results"]["vtc_scenes_blank"]["accuracy,none"]
    assert blank < scenes["accuracy,none"]
    assert results["results"]["vtc_captions"]["objects_f1,none"] > 0.5

    counts = [s["token_counts"][0] for task in samples for s in samples[task]]
    assert len(counts) == 8 + 8 + 2
    for count in counts:
        assert (count["visual_tokens"], count["llm_tokens"]) == (196, 22)
        assert count["kept_fraction"] == 22 / 196
        assert count["ttft_ms"] > count["encoder_ms"] > 0 and count["selector_ms"] > 0
    found = results["throughput"]
    for name in ("kept_fraction", "ttft_ms", "encoder_ms", "selector_ms", "tpot_ms"):
        assert found[f"avg_{name}"] == pytest.approx(sum(c[name] for c in counts) / len(counts))
    recalls = [s["token_counts"][0].get("evidence_recall") for s in samples["vtc_scenes"]]
    known = [recall for recall in recalls if recall is not None]
    assert found["avg_evidence_recall/vtc_scenes"] == pytest.approx(sum(known) / len(known))
    assert (found["avg_n_samples"], found["avg_n_failed"]) == (18, 0)


@pytest.mark.slow
def test_without_compression(shell, model_name, tasks_folder):
    done, results, samples = evaluated(
        shell, model_name, "method=none", "vtc_scenes", str(tasks_folder)
    )
    assert results is not None, done.stderr
    assert results["results"]["vtc_scenes"]["accuracy,none"] > 0.85
    counts = [s["token_counts"][0] for s in samples["vtc_scenes"]]
    assert {(c["llm_tokens"], c["kept_fraction"]) for c in counts} == {(196, 1.0)}


def test_a_failed_sample_leaves_no_accuracy(shell, model_name, broken_tasks):
    done, results, _ = evaluated(
        shell, model_name, "method=vtc_cls,keep=0.11", "vtc_scenes", str(broken_tasks)
    )
    assert results is None
    assert "1 of 8 samples failed, so no accuracy is reported" in done.stderr + done.stdout
    assert "accuracy_color" not in done.stdout
