"""lmms-eval's own code of POPE, TextVQA, GQA and MME, scoring compressed models on local data.

Scores are computed again from the answers and the data, by other means than lmms-eval's.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections import defaultdict
from pathlib import Path

import pytest

pytestmark = pytest.mark.eval

TASKS = ("pope", "textvqa_val", "gqa", "mme")
QUESTIONS = 12
KEPT = 65 / 196  # what 0.33 comes to


@pytest.fixture(scope="module")
def samples_folder(tmp_path_factory):
    """What `vtc tasks --stock-samples` writes."""
    from vtc.cli import main

    folder = tmp_path_factory.mktemp("stock") / "samples"
    assert main(["tasks", "--stock-samples", str(folder), "--questions", str(QUESTIONS)]) == 0
    return folder


@pytest.fixture(scope="module")
def rows(samples_folder):
    """The questions of each task as they lie on the disk, without pictures."""
    import pyarrow.parquet as pq

    def read(task):
        (file,) = (
            file
            for file in (samples_folder / "data" / task).rglob("*.parquet")
            if "images" not in file.parent.name
        )
        columns = [name for name in pq.read_schema(file).names if name != "image"]
        return pq.read_table(file, columns=columns).to_pylist()

    return {task: read(task) for task in TASKS}


@pytest.fixture(scope="module")
def evaluated(loaded, samples_folder, tmp_path_factory):
    """lmms-eval's results of the four tasks under given arguments, in this process."""
    from vtc.evaluation.evaluate import evaluate, load_tasks, quiet
    from vtc.evaluation.model import Vtc

    def run(folder=samples_folder / "tasks", names=TASKS, **arguments):
        with pytest.MonkeyPatch.context() as patch, quiet():
            # TextVQA's code writes a file for a server
            patch.chdir(tmp_path_factory.mktemp("run"))
            tasks = load_tasks(names, folder)
            return evaluate(Vtc(loaded, batch_size=QUESTIONS, timed_samples=0, **arguments), tasks)

    return run


@pytest.fixture(scope="module")
def compressed(evaluated):
    return evaluated(method="vtc_cls", keep=0.33)


@pytest.fixture(scope="module")
def full(evaluated):
    return evaluated(method="none")


def again(task, questions, said):
    """The scores of a task from its questions and the answers, by their published definitions."""
    if task == "pope":
        pairs = [(a.strip().lower(), q["answer"]) for q, a in zip(questions, said, strict=True)]
        hits = sum(pair == ("yes", "yes") for pair in pairs)
        claimed = sum(answer == "yes" and true in ("yes", "no") for answer, true in pairs)
        # as in the stock code, what is neither yes nor no misses nothing
        missed = sum(pair == ("no", "yes") for pair in pairs)
        return {
            "pope_accuracy": sum(answer == true for answer, true in pairs) / len(pairs),
            "pope_f1_score": 2 * hits / (claimed + hits + missed),
            "pope_yes_ratio": sum(true == "yes" for _, true in pairs) / len(pairs),
        }
    if task == "textvqa_val":
        scores = []
        for question, answer in zip(questions, said, strict=True):
            same = question["answers"].count(answer.strip())
            # each annotator is left out once
            scores.append(
                (same * min(1, max(same - 1, 0) / 3) + (10 - same) * min(1, same / 3)) / 10
            )
        return {"exact_match": sum(scores) / len(scores)}
    if task == "gqa":
        right = [a.strip() == q["answer"] for q, a in zip(questions, said, strict=True)]
        return {"exact_match": sum(right) / len(right)}
    pictures = defaultdict(lambda: defaultdict(list))
    for question, answer in zip(questions, said, strict=True):
        # as MME's own script reads an answer
        read = next((word for word in ("yes", "no") if word in answer.strip().lower()[:4]), None)
        right = read == question["answer"].lower()
        pictures[question["category"]][question["question_id"]].append(right)
    total = 0
    for of_category in pictures.values():
        every = [right for pair in of_category.values() for right in pair]
        both = [all(pair) for pair in of_category.values()]
        total += 100 * (sum(every) / len(every) + sum(both) / len(both))
    return {"mme_perception_score": total}


def answers(samples):
    """By question: a list of one in memory, and that one in lmms-eval's file."""
    said = [s["filtered_resps"] for s in sorted(samples, key=lambda s: s["doc_id"])]
    return [one if isinstance(one, str) else one[0] for one in said]


def agree(results, samples, task, questions):
    expected = again(task, questions, answers(samples))
    for metric, value in expected.items():
        assert results["results"][task][f"{metric},none"] == pytest.approx(value), metric
    return expected


@pytest.mark.parametrize("task", TASKS)
def test_the_scores_are_those_of_the_answers(task, full, compressed, rows):
    for results in (full, compressed):
        agree(results, results["samples"][task], task, rows[task])


def test_the_formulas_also_hold_where_answers_are_wrong(evaluated, rows):
    # few enough tokens that every task has mistakes
    results = evaluated(method="vtc_cls", keep=6)
    for task in TASKS:
        found = agree(results, results["samples"][task], task, rows[task])
        assert min(found.values()) < max(best(task, rows[task]).values())


def best(task, questions):
    """What someone who always says the right answer gets."""
    said = [question.get("answer") or question["answers"][0] for question in questions]
    return again(task, questions, said)


def test_a_perfect_answer_is_not_a_perfect_score_where_annotators_differ(rows):
    # 1, 1, 1 and 0.6: two of ten agree
    assert best("textvqa_val", rows["textvqa_val"])["exact_match"] == pytest.approx(0.9)
    assert best("mme", rows["mme"]) == {"mme_perception_score": 600}


@pytest.mark.parametrize("task", TASKS)
def test_the_full_model_sees_and_a_third_of_the_tokens_does_nearly_as_well(
    task, full, compressed, rows
):
    (metric, most), *_ = best(task, rows[task]).items()
    key = f"{metric},none"
    assert full["results"][task][key] > 0.85 * most
    assert compressed["results"][task][key] > 0.75 * most


@pytest.mark.parametrize("task", TASKS)
def test_what_was_kept_is_in_the_samples(task, full, compressed):
    for results, share in ((full, 1.0), (compressed, KEPT)):
        counts = [sample["token_counts"][0] for sample in results["samples"][task]]
        assert len(counts) == QUESTIONS
        assert {count["kept_fraction"] for count in counts} == {share}


def test_a_blank_picture_is_worse(evaluated, samples_folder, full, rows, tmp_path):
    for task in TASKS:
        blank = [
            f"include: {samples_folder / 'tasks' / task}.yaml",
            f"task: {task}_blank",
            "doc_to_visual: !function vtc.testbed.scoring.blank",
        ]
        (tmp_path / f"{task}_blank.yaml").write_text("\n".join(blank))
    names = [f"{task}_blank" for task in TASKS]
    results = evaluated(tmp_path, names, method="none")
    for task in TASKS:
        said = answers(results["samples"][f"{task}_blank"])
        (metric, guessed), *_ = again(task, rows[task], said).items()
        assert guessed < 0.75 * full["results"][task][f"{metric},none"]


@pytest.mark.slow
def test_the_command_from_the_page(samples_folder, model_name, rows, tmp_path):
    # the groups carry the same names inside, and win over lmms-eval's own tasks of that name
    groups = ",".join(f"vtc_local_{task}" for task in TASKS)
    folder = Path(sys.executable).parent
    environment = os.environ | {
        "PATH": f"{folder}{os.pathsep}{os.environ['PATH']}",
        "HF_HUB_OFFLINE": "1",
        "HF_HOME": str(tmp_path / "home"),
    }
    arguments = (
        f"lmms-eval --model vtc --model_args pretrained={model_name},device=cpu,method=vtc_cls,"
        f"keep=0.33 --tasks {groups} --include_path {samples_folder / 'tasks'} --batch_size 1 "
        f"--log_samples --output_path out"
    )
    done = subprocess.run(
        arguments.split(), cwd=tmp_path, env=environment, capture_output=True, text=True
    )
    # its exit status says nothing
    found = list(tmp_path.rglob("*_results.json"))
    assert found, done.stderr
    results = json.loads(found[0].read_text())
    for task in TASKS:
        (file,) = tmp_path.rglob(f"*_samples_{task}.jsonl")
        samples = [json.loads(line) for line in file.read_text().splitlines()]
        agree(results, samples, task, rows[task])
        counts = [sample["token_counts"][0] for sample in samples]
        assert [count["kept_fraction"] for count in counts] == [KEPT] * QUESTIONS


@pytest.mark.slow
def test_a_sweep_over_the_four(sweep, samples_folder, rows, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    result = sweep(
        tmp_path / "out",
        include_path=samples_folder / "tasks",
        tasks=TASKS,
        keeps=(0.33,),
        questions=8,
    )
    found = {(row["task"], row["method"]): row for row in result.rows}
    for task in TASKS:
        assert found[task, "none"]["accuracy"] > 0.7
        assert found[task, "vtc_cls"]["kept_fraction"] == pytest.approx(KEPT)
        own = result.samples[result.samples["task"] == task]
        for method in ("none", "vtc_cls", "downsample"):
            part = own[own["method"] == method].sort_values("doc_id")
            said, questions = part["answer"].tolist(), rows[task][:8]
            # of MME, a sweep compares single questions
            wanted = (
                sum(a == q["answer"].lower() for q, a in zip(questions, said, strict=True)) / 8
                if task == "mme"
                else next(iter(again(task, questions, said).values()))
            )
            assert part["score"].mean() == pytest.approx(wanted)
