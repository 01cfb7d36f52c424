"""lmms-eval's own code of POPE, TextVQA, GQA and MME, scoring compressed models on local data.

Scores are computed again from the answers and the data, by other means than lmms-eval's.
"""

from __future__ import annotations

from collections import defaultdict

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
    return [sample["filtered_resps"][0] for sample in sorted(samples, key=lambda s: s["doc_id"])]


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
