"""Accuracy by kind of question at every keep, against the samples."""

import pytest

from vtc.evaluation import table
from vtc.evaluation.heatmap import heat_maps

pytestmark = pytest.mark.eval

CELLS = {
    ("none", "keep", None, 0): [1, 1, 1, 0],
    ("vtc_cls", "keep", 0.5, 0): [1, 1, 0, 0],
    ("vtc_cls", "renumber", 0.5, 0): [0, 0, 0, 0],
    ("vtc_cls", "keep", 0.1, 0): [1, 0, 0, 1],
    ("shortv", "keep", 0.6, 0): [0, 1, 1, 1],
    ("shortv", "keep", 0.2, 0): [1, 0, 1, 0],
    ("var", "keep", None, 0): [1, 1, 1, 1],
    ("random", "keep", 0.5, 0): [1, 0, 0, 0],
    ("random", "keep", 0.1, 0): [0, 0, 0, 0],
}
KINDS = ["color", "color", "count", "count"]


@pytest.fixture
def maps(samples_frame):
    frame = samples_frame(CELLS)
    frame["kind"] = [KINDS[i] for i in frame["doc_id"]]
    return heat_maps(frame, table.tables(frame)[1])


def texts(heat):
    return {line.name: [cell.text for cell in line.cells] for line in heat.lines}


def test_a_map_for_every_keep_with_the_number_of_questions(maps):
    assert [heat.keep for heat in maps] == ["0.5", "0.1"]
    assert all(heat.kinds == [("color", 2), ("count", 2)] for heat in maps)


def test_kinds_may_be_called_like_the_ends_of_an_interval(samples_frame):
    frame = samples_frame(CELLS)
    before = table.tables(frame)[1]
    # the first question has none
    frame["kind"] = [{1: "low", 2: "high", 3: "high"}.get(i) for i in frame["doc_id"]]
    rows = table.tables(frame)[1]
    for name in ("accuracy", "accuracy_low", "accuracy_high"):
        assert [row[name] for row in rows] == [row[name] for row in before]
    heat, _ = heat_maps(frame, rows)
    assert heat.kinds == [("high", 2), ("low", 1)]
    assert texts(heat)["vtc_cls"] == ["0", "100"]


def test_each_method_stands_once_under_its_first_policy(maps):
    assert texts(maps[0])["vtc_cls"] == ["100", "0"]
    assert texts(maps[1])["vtc_cls"] == ["50", "50"]
    for heat in maps:
        assert [line.name for line in heat.lines] == [
            "full model",
            "vtc_cls",
            "shortv",
            "var",
            "random",
        ]


def test_methods_that_skip_work_stand_where_as_many_tokens_are_active(maps):
    assert texts(maps[0])["shortv"] == ["50", "100"]
    assert texts(maps[1])["shortv"] == ["50", "50"]


def test_shades_are_what_is_lost_against_the_full_model_on_that_kind(maps):
    by_name = {line.name: line.cells for line in maps[0].lines}
    assert [cell.shade for cell in by_name["full model"]] == [0, 0]
    # 0 of 50 points are left of counts: the full shade
    assert [(cell.shade, cell.won) for cell in by_name["vtc_cls"]] == [(0, False), (100, False)]
    assert [(cell.shade, cell.won) for cell in by_name["shortv"]] == [(100, False), (100, True)]


def test_questions_without_kinds_have_no_map(samples_frame):
    frame = samples_frame(CELLS)
    assert heat_maps(frame, table.tables(frame)[1]) == []
