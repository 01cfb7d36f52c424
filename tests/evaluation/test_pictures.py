"""The pictures of the report show what the scored runs kept."""

import shutil

import pytest
from PIL import Image

import vtc
from vtc import viz
from vtc.evaluation import pictures, table
from vtc.evaluation.evaluate import load_tasks, quiet
from vtc.evaluation.kept import Kept

pytestmark = pytest.mark.eval


@pytest.fixture(scope="module")
def gallery(swept, loaded, scenes):
    return pictures.Gallery(swept.samples, swept.summary, loaded, scenes[0])


def test_overlay_and_scores_are_those_of_the_budget_policy_and_seed_that_were_scored(
    gallery, loaded, scenes
):
    (example,) = gallery.examples(1)
    doc = scenes[0].eval_docs[0]
    content = [{"type": "image"}, {"type": "text", "text": doc["question"]}]
    text = loaded.processor.apply_chat_template(
        [{"role": "user", "content": content}], tokenize=False, add_generation_prompt=True
    )
    inputs = loaded.processor(images=[doc["image"]], text=[text], return_tensors="pt")
    drawn, scored = {}, {}
    for method, keep in (("none", 1.0), ("vtc_cls", 0.11), ("random", 0.11), ("uniform", 0.11)):
        with vtc.patch(loaded.model, method, keep, seed=0) as handle:
            loaded.model.generate(**inputs, max_new_tokens=1)
        selection = handle.selections[0]
        drawn[method] = viz.overlay(doc["image"], selection, evidence=doc["evidence"])
        if method == "vtc_cls":
            scored[method] = viz.score_map(doc["image"], selection)
    shown = {one.title: one for one in example.shown}
    assert shown["full model"].image == drawn["none"]
    assert all(shown[name].image == drawn[name] for name in ("vtc_cls", "random", "uniform"))
    assert shown["vtc_cls"].scores == scored["vtc_cls"]
    # nothing is chosen by a score there
    assert all(shown[name].scores is None for name in ("full model", "uniform", "average_pool"))


def test_failures_show_the_picture_and_what_was_left_of_it(gallery, swept, loaded, scenes):
    found = gallery.failures(4)
    assert 0 < len(found) <= 4
    for broken in found:
        doc = scenes[0].eval_docs[broken.failure.sample["doc_id"]]
        assert broken.question == doc["question"]
        seen = viz.as_seen(doc["image"], loaded.processor)
        assert broken.picture == seen and broken.left.size != (0, 0)
        with vtc.patch(loaded.model, broken.failure.row["method"], 0.11, seed=0) as handle:
            content = [{"type": "image"}, {"type": "text", "text": doc["question"]}]
            text = loaded.processor.apply_chat_template(
                [{"role": "user", "content": content}], tokenize=False, add_generation_prompt=True
            )
            inputs = loaded.processor(images=[doc["image"]], text=[text], return_tensors="pt")
            loaded.model.generate(**inputs, max_new_tokens=1)
        left = viz.last_left(handle.remaining)
        assert broken.left == viz.overlay(seen, left, evidence=doc["evidence"])


def test_what_is_drawn_is_what_was_kept_when_a_task_writes_around_its_questions(
    sweep, loaded, tasks_folder, tmp_path
):
    folder = shutil.copytree(tasks_folder, tmp_path / "tasks")
    file = folder / "vtc_scenes.yaml"
    around = "what is left of the blue ring? {{question}} is there a red star?"
    file.write_text(file.read_text().replace("{{question}}", around))
    given = {"methods": ("fastv",), "keeps": (0.11,), "include_path": folder, "questions": 4}
    result = sweep(tmp_path / "out", timed_samples=0, batch_size=1, **given)
    with quiet():
        (task,) = load_tasks(("vtc_scenes",), folder)
    gallery = pictures.Gallery(result.samples, result.summary, loaded, task)
    (row,) = [row for row in result.summary if row["method"] == "fastv"]
    own = result.samples[result.samples["label"] == "fastv"].sort_values("doc_id")
    masks = Kept.read(tmp_path / "out" / "cells" / f"{row['cells'][0]}.kept.npz")
    for line, sample in enumerate(own.to_dict("records")):
        with gallery._asked(sample, row, gallery._image(line)) as handle:
            left = viz.last_left(handle.remaining).mask()[0]
        assert (left.numpy() == masks[line][0].kept).all()


@pytest.mark.parametrize("evidence", ["in the caption", [3], [[0, 1, 2]], {"page": 1}])
def test_what_other_data_sets_call_evidence_is_no_box(evidence, gallery, monkeypatch):
    docs = [{"evidence": evidence, "image": Image.new("RGB", (8, 8))}]
    monkeypatch.setattr(type(gallery._task), "eval_docs", docs)
    picture = docs[0]["image"]
    assert gallery._boxes(0, picture, picture) == []


def test_the_budget_nearest_to_eleven_percent_is_shown_once_per_method(samples_frame):
    cells = {("none", "keep", None, 0): [1]}
    for method in ("vtc_cls", "random"):
        for positions in ("keep", "renumber"):
            for keep in (0.5, 0.2, 0.055):
                cells[method, positions, keep, 0] = [1]
    rows = pictures.rows_to_show(table.tables(samples_frame(cells))[1], "t")
    shown = [(row["label"], row["positions"], row["keep"]) for row in rows]
    assert shown == [
        ("none", "keep", "1.0"),
        ("vtc_cls", "keep", "0.055"),
        ("random", "keep", "0.055"),
    ]


def test_no_pictures_are_asked_for(gallery):
    assert gallery.examples(0) == [] and gallery.failures(0) == []
