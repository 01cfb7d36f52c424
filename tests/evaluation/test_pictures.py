"""The pictures of the report show what the scored runs kept."""

import pytest

import vtc
from vtc import viz
from vtc.evaluation import pictures, table

pytestmark = pytest.mark.eval


def test_the_overlay_is_that_of_the_budget_policy_and_seed_that_were_scored(swept, loaded, scenes):
    (example,) = pictures.examples(swept.samples, swept.summary, loaded, scenes[0], 1)
    doc = scenes[0].eval_docs[0]
    content = [{"type": "image"}, {"type": "text", "text": doc["question"]}]
    text = loaded.processor.apply_chat_template(
        [{"role": "user", "content": content}], tokenize=False, add_generation_prompt=True
    )
    inputs = loaded.processor(images=[doc["image"]], text=[text], return_tensors="pt")
    drawn = {}
    for method, keep in (("none", 1.0), ("vtc_cls", 0.11), ("random", 0.11), ("uniform", 0.11)):
        with vtc.patch(loaded.model, method, keep, seed=0) as handle:
            loaded.model.generate(**inputs, max_new_tokens=1)
        picture = viz.overlay(doc["image"], handle.selections[0], evidence=doc["evidence"])
        drawn[method] = pictures._data_uri(picture)
    shown = {one.title: one.image for one in example.shown}
    assert shown["full model"] == drawn["none"]
    assert all(shown[method] == drawn[method] for method in ("vtc_cls", "random", "uniform"))


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


def test_no_pictures_are_asked_for(swept, loaded, scenes):
    assert pictures.examples(swept.samples, swept.summary, loaded, scenes[0], 0) == []
