"""One run of lmms-eval: all of a task's questions scored, or an error instead of numbers."""

from types import SimpleNamespace

import pytest

from vtc.errors import InputError, OptionError, SampleError, VtcError
from vtc.evaluation.evaluate import evaluate, flat_sample, load_tasks, quiet
from vtc.evaluation.model import Vtc

pytestmark = pytest.mark.eval


def run(loaded, tasks, questions=8, **arguments):
    with quiet():
        return evaluate(Vtc(loaded, **{"method": "none"} | arguments), tasks, questions)


def test_an_unknown_task(tasks_folder):
    with pytest.raises(OptionError, match="task 'vtc_scene' is unknown; expected one of vtc_"):
        load_tasks(["vtc_scene"], tasks_folder)


def test_questions_that_are_not_there(tmp_path, tasks_folder, monkeypatch):
    # lmms-eval tries five times and waits in between
    monkeypatch.setattr("tenacity.nap.time", SimpleNamespace(sleep=lambda seconds: None))
    for file in tasks_folder.glob("*.yaml"):
        (tmp_path / file.name).write_bytes(file.read_bytes())
    (tmp_path / "scoring.py").write_bytes((tasks_folder / "scoring.py").read_bytes())
    with (
        quiet(),
        pytest.raises(InputError, match="the questions of vtc_scenes could not be loaded"),
    ):
        load_tasks(["vtc_scenes"], tmp_path)


def test_a_run_can_be_repeated_and_asks_the_first_questions(loaded, scenes):
    first, second = run(loaded, scenes, 8), run(loaded, scenes, 5)
    ids = [sample["doc_id"] for sample in second["samples"]["vtc_scenes"]]
    assert ids == list(range(5))
    answers = [
        [flat_sample("t", sample)["answer"] for sample in results["samples"]["vtc_scenes"]]
        for results in (first, second)
    ]
    assert answers[0][:5] == answers[1]


def test_accuracy_and_accuracy_per_kind_are_the_means_of_the_samples(loaded, scenes):
    results = run(loaded, scenes, 16, method="random", keep=0.11)
    samples = [flat_sample("t", sample) for sample in results["samples"]["vtc_scenes"]]
    found = results["results"]["vtc_scenes"]
    assert found["accuracy,none"] == pytest.approx(sum(s["score"] for s in samples) / 16)
    for kind in {sample["kind"] for sample in samples}:
        own = [sample["score"] for sample in samples if sample["kind"] == kind]
        assert found[f"accuracy_{kind},none"] == pytest.approx(sum(own) / len(own))
    for name in ("kept_fraction", "evidence_recall", "ttft_ms", "encoder_ms"):
        values = [s[name] for s in samples if s.get(name) is not None]
        assert results["throughput"][f"avg_{name}"] == pytest.approx(sum(values) / len(values))
    # "no" has no evidence, so fewer questions have a recall than were asked
    assert 0 < len([s for s in samples if "evidence_recall" in s]) < 16


def test_every_task_has_means_of_its_own(loaded, tasks_folder):
    with quiet():
        tasks = load_tasks(["vtc_scenes", "vtc_captions"], tasks_folder)
    results = run(loaded, tasks, 2, method="uniform", keep=0.5)
    found = results["throughput"]
    both = [found[f"avg_ttft_ms/{task}"] for task in ("vtc_scenes", "vtc_captions")]
    assert found["avg_ttft_ms"] == pytest.approx(sum(both) / 2)


def test_a_failed_sample_leaves_no_results(loaded, broken_tasks):
    with quiet():
        tasks = load_tasks(["vtc_scenes"], broken_tasks)
    message = "1 of 8 samples failed, so no accuracy is reported; the first was question 3 of vtc_"
    with pytest.raises(SampleError, match=message):
        run(loaded, tasks, 8)


def test_a_failure_of_lmms_eval_is_one_of_ours(loaded, scenes, monkeypatch):
    import lmms_eval.evaluator

    def fail(**arguments):
        raise ModuleNotFoundError("No module named 'filelock._api'")

    monkeypatch.setattr(lmms_eval.evaluator, "evaluate", fail)
    with pytest.raises(VtcError, match="lmms-eval stopped: ModuleNotFoundError: No module named"):
        run(loaded, scenes)


@pytest.mark.parametrize("lost", ["sample", "all"])
def test_results_with_samples_missing_are_refused(loaded, scenes, monkeypatch, lost):
    import lmms_eval.evaluator

    stock = lmms_eval.evaluator.evaluate

    def forget(**arguments):
        results = stock(**arguments)
        results["samples"] = {} if lost == "all" else {"vtc_scenes": []}
        return results

    monkeypatch.setattr(lmms_eval.evaluator, "evaluate", forget)
    with pytest.raises(
        VtcError, match="no samples" if lost == "all" else "scored 0 of 4 questions"
    ):
        run(loaded, scenes, 4)


def sample(**metrics):
    return {
        "doc_id": 3,
        "doc": {"kind": "color", "question": "which?"},
        "target": "red",
        "filtered_resps": ["red"],
        "token_counts": [{"kept_fraction": 0.5}],
        **metrics,
    }


@pytest.mark.parametrize(
    ("metrics", "metric", "score"),
    [
        ({"accuracy": 1.0, "accuracy_color": 0.0}, None, 1.0),
        ({"anls": 0.25, "length": 7}, None, 0.25),
        ({"unknown": True}, None, 1.0),
        ({"accuracy": 1.0, "objects_f1": 0.5}, "objects_f1", 0.5),
        # POPE and MME log records
        ({"pope_accuracy": {"question_id": 1, "score": 1.0}}, None, 1.0),
    ],
)
def test_the_score_of_a_sample(metrics, metric, score):
    found = flat_sample("t", sample(**metrics), metric)
    assert found["score"] == score
    assert (found["kind"], found["answer"], found["kept_fraction"]) == ("color", "red", 0.5)


@pytest.mark.parametrize(("metrics", "metric"), [({"note": "x"}, None), ({"accuracy": 1.0}, "f1")])
def test_no_score(metrics, metric):
    with pytest.raises(VtcError, match="task t gave no number for question 3"):
        flat_sample("t", sample(**metrics), metric)


@pytest.mark.parametrize("score", [float("nan"), float("inf"), 87.5, -1])
def test_what_is_no_share_of_a_right_answer_is_refused(score):
    message = rf"gave accuracy={score} for question 3, expected a score from 0 to 1"
    with pytest.raises(VtcError, match=message):
        flat_sample("t", sample(accuracy=score, objects_f1=0.5))
    assert flat_sample("t", sample(accuracy=score, objects_f1=0.5), "objects_f1")["score"] == 0.5
