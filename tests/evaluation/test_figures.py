"""The plot: two files of one figure, the same for the same table."""

import io
import re

import pytest
from PIL import Image

from vtc.evaluation import figures, table

pytestmark = pytest.mark.eval

CELLS = {
    ("none", "keep", None, 0): [1, 1, 1, 1],
    ("vtc_cls", "keep", 0.5, 0): [1, 1, 1, 0],
    ("vtc_cls", "renumber", 0.5, 0): [1, 1, 0, 0],
    ("random", "keep", 0.5, 0): [1, 1, 0, 0],
    ("random", "keep", 0.5, 1): [1, 0, 0, 0],
}


@pytest.fixture
def summary(samples_frame):
    return table.tables(samples_frame(CELLS))[1]


def texts(svg):
    """matplotlib draws letters as paths and leaves each text as a comment."""
    return re.findall(r"<!-- (.*?) -->", svg.decode())


def test_the_same_table_gives_the_same_files(summary, samples_frame):
    again = table.tables(samples_frame(CELLS))[1]
    assert figures.accuracy_plot(summary, {"t": 0.25}) == figures.accuracy_plot(again, {"t": 0.25})


def test_another_accuracy_changes_both(summary, samples_frame):
    other = table.tables(samples_frame(CELLS | {("vtc_cls", "keep", 0.5, 0): [0, 0, 0, 0]}))[1]
    before, after = figures.accuracy_plot(summary, {}), figures.accuracy_plot(other, {})
    assert before["png"] != after["png"] and before["svg"] != after["svg"]


def test_png_and_svg_are_one_figure(summary):
    plot = figures.accuracy_plot(summary, {"t": 0.25})
    image = Image.open(io.BytesIO(plot["png"]))
    width, height = map(float, re.search(rb'viewBox="0 0 (\S+) (\S+)"', plot["svg"]).groups())
    # an SVG's unit is 1/72 inch
    assert image.size == (round(width / 72 * 160), round(height / 72 * 160))


def test_every_curve_is_named_with_its_policy(summary):
    found = texts(figures.accuracy_plot(summary, {"t": 0.25})["svg"])
    names = {"vtc_cls, keep", "vtc_cls, renumber", "random, keep (2 seeds)"}
    assert names | {"full model", "guessing", "t, 4 questions"} <= set(found)


def test_a_panel_per_task(summary):
    both = [*summary, *(row | {"task": "u"} for row in summary)]
    found = texts(figures.accuracy_plot(both, {"t": 0.25})["svg"])
    assert {"t, 4 questions", "u, 4 questions"} <= set(found)
    assert found.count("guessing") == 1


def test_one_question_can_be_drawn(samples_frame):
    cells = {("none", "keep", None, 0): [1], ("random", "keep", 0.5, 0): [0.5]}
    assert figures.accuracy_plot(table.tables(samples_frame(cells))[1], {})["png"]


def test_nothing_global_changes(summary):
    import matplotlib

    before = dict(matplotlib.rcParams)
    figures.accuracy_plot(summary, {})
    assert dict(matplotlib.rcParams) == before
