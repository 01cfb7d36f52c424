"""The plot: two files of one figure, the same for the same table."""

import io
import re

import pytest
from PIL import Image

from vtc.evaluation import figures, table
from vtc.evaluation.groups import grouped
from vtc.evaluation.panels import draw

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
    first, second = (figures.accuracy_chart(rows, {"t": 0.25}) for rows in (summary, again))
    assert first.sheet() == second.sheet()
    assert first.alone(first.panels[0]) == second.alone(second.panels[0])


def test_another_accuracy_changes_both(summary, samples_frame):
    other = table.tables(samples_frame(CELLS | {("vtc_cls", "keep", 0.5, 0): [0, 0, 0, 0]}))[1]
    before, after = (figures.accuracy_chart(rows, {}).sheet() for rows in (summary, other))
    assert before["png"] != after["png"] and before["svg"] != after["svg"]


def test_png_and_svg_are_one_figure(summary):
    plot = figures.accuracy_chart(summary, {"t": 0.25}).sheet()
    image = Image.open(io.BytesIO(plot["png"]))
    width, height = map(float, re.search(rb'viewBox="0 0 (\S+) (\S+)"', plot["svg"]).groups())
    # an SVG's unit is 1/72 inch
    assert image.size == (round(width / 72 * 160), round(height / 72 * 160))


def test_every_curve_is_named_with_its_policy(summary):
    found = texts(figures.accuracy_chart(summary, {"t": 0.25}).sheet()["svg"])
    names = {"vtc_cls, keep", "vtc_cls, renumber", "random, keep (2 seeds)"}
    assert names | {"full model", "guessing", "t, 4 questions"} <= set(found)


def test_a_panel_per_task(summary):
    both = [*summary, *(row | {"task": "u"} for row in summary)]
    found = texts(figures.accuracy_chart(both, {"t": 0.25}).sheet()["svg"])
    assert {"t, 4 questions", "u, 4 questions"} <= set(found)
    assert found.count("guessing") == 1


def test_one_question_can_be_drawn(samples_frame):
    cells = {("none", "keep", None, 0): [1], ("random", "keep", 0.5, 0): [0.5]}
    assert figures.accuracy_chart(table.tables(samples_frame(cells))[1], {}).sheet()["png"]


def test_nothing_global_changes(summary):
    import matplotlib

    before = dict(matplotlib.rcParams)
    figures.accuracy_chart(summary, {}).sheet()
    assert dict(matplotlib.rcParams) == before


MANY = {
    ("none", "keep", None, 0): [1, 1, 1, 1],
    **{("vtc_cls", p, k, 0): [1, 1, 0, 0] for p in ("keep", "renumber") for k in (0.5, 0.1)},
    **{("random", p, k, 0): [1, 0, 0, 0] for p in ("keep", "renumber") for k in (0.5, 0.1)},
    **{("shortv", "keep", k, 0): [1, 1, 1, 0] for k in (0.8, 0.4)},
    ("var", "keep", None, 0): [1, 1, 1, 1],
    ("vtc_cls@0.5+shortv@0.5", "keep", None, 0): [1, 0, 1, 0],
}


@pytest.fixture
def many(samples_frame):
    frame = samples_frame(MANY)
    frame["ttft_ms"], frame["full_ttft_ms"] = 10.0, 20.0
    frame["ttft_ratio"] = 0.5
    return table.tables(frame)[1]


def test_methods_that_keep_every_token_are_not_drawn_against_tokens_kept(many):
    found = texts(figures.accuracy_chart(many, {}).sheet()["svg"])
    assert {"vtc_cls, keep", "vtc_cls, renumber"} <= set(found)
    assert not [text for text in found if text.startswith(("shortv", "var"))]


def test_against_active_tokens_all_methods_are_drawn_under_one_policy(many):
    found = texts(figures.active_chart(many, {}).sheet()["svg"])
    labels = {"vtc_cls", "random", "shortv", "var", "vtc_cls@0.5+shortv@0.5"}
    assert labels <= set(found)
    assert not [text for text in found if "renumber" in text]
    # a panel each, with random named in all of them
    assert found.count("random") == len([t for t in found if t.startswith("t, 4 questions: ")]) == 4


def test_the_time_figure_names_the_machine_and_the_full_models_time(many):
    found = texts(figures.time_chart(many, {}, "a slow machine, 1 thread").sheet()["svg"])
    assert "10 ms on a slow machine, 1 thread, median of 4 timed," in found
    assert "bars: 20th to 80th percentile" in found


def test_without_times_there_is_no_time_figure(summary):
    assert figures.time_chart(summary, {}) is None


def test_every_curve_stands_in_one_panel(many):
    curves = list(table.curves(many, "active_fraction").items())
    panels = grouped(curves)
    assert sorted(key for _, own in panels for key, _ in own) == sorted(key for key, _ in curves)
    titles = {key.label: title for title, own in panels for key, _ in own}
    assert titles == {
        "vtc_cls": "in the encoder and before the LLM",
        "shortv": "in the LLM, to a budget",
        "var": "compositions and methods without a budget",
        "vtc_cls@0.5+shortv@0.5": "compositions and methods without a budget",
        "random": "baselines",
    }


def test_a_few_curves_share_a_panel_and_many_of_one_group_take_two(samples_frame):
    def panels(methods):
        cells = {("none", "keep", None, 0): [1], ("random", "keep", 0.5, 0): [1]}
        cells |= {(method, "keep", 0.5, 0): [1] for method in methods}
        summary = table.tables(samples_frame(cells))[1]
        return grouped(list(table.curves(summary).items()))

    ((title, own),) = panels([f"vtc_cls:start={i}" for i in range(5)])
    assert title == "" and len(own) == 6
    found = panels([f"vtc_cls:start={i}" for i in range(12)])
    assert [len(own) for _, own in found] == [6, 6, 1]
    assert found[0][0] == "in the encoder and before the LLM (1 of 2)"


def test_models_have_panels_of_their_own_and_a_method_looks_the_same_in_all(summary, samples_frame):
    other = table.tables(samples_frame(CELLS, model="another"))[1]
    chart = figures.accuracy_chart([*summary, *other], {})
    assert [panel.model for panel in chart.panels] == ["m", "another"]
    titles = [text for text in texts(chart.sheet()["svg"]) if "questions" in text]
    assert titles == ["m: t, 4 questions", "another: t, 4 questions"]
    assert chart.panels[0].looks == chart.panels[1].looks
    for panel in chart.panels:
        assert {key.model for key, _ in panel.curves} == {panel.model}


def test_methods_of_a_panel_can_be_told_apart(samples_frame):
    cells = {("none", "keep", None, 0): [1], ("random", "keep", 0.5, 0): [1]}
    cells |= {(f"vtc_cls:start={i}", "keep", 0.5, 0): [1] for i in range(11)}
    chart = figures.accuracy_chart(table.tables(samples_frame(cells))[1], {})
    for panel in chart.panels:
        looks = [panel.looks[key.label] for key, _ in panel.curves]
        assert len(set(looks)) == len(looks)


def test_the_front_is_drawn_where_something_was_timed(many):
    found = texts(figures.time_chart(many, {}).sheet()["svg"])
    assert found.count("Pareto front") == len(figures.time_chart(many, {}).panels)
    assert "Pareto front" not in texts(figures.active_chart(many, {}).sheet()["svg"])


def test_the_front_ends_at_the_full_model_under_any_policy(summary):
    from matplotlib.figure import Figure

    times = {"ttft_ms": 9.0, "ttft_ratio_p20": 0.4, "ttft_ratio_p80": 0.6, "n_timed": 3}
    shown = ("none", "keep"), ("vtc_cls", "renumber")
    rows = [row for row in summary if (row["method"], row["positions"]) in shown]
    chart = figures.time_chart([row | times | {"ttft_ratio": 0.5} for row in rows], {})
    axes = Figure().subplots()
    draw(axes, chart.panels[0], chart.axis, 6.0)
    (line,) = [line for line in axes.get_lines() if line.get_label() == "Pareto front"]
    assert line.get_xdata().tolist() == [0.5, 1.0]
