"""The HTML page: one file that needs nothing else, with every row, method and picture."""

import base64
import io
import itertools
import json
import re
import shlex
from html.parser import HTMLParser
from pathlib import Path

import pandas as pd
import pytest
from PIL import Image

from vtc.evaluation import printed, report, table
from vtc.evaluation.pictures import Example, Shown, rows_to_show
from vtc.evaluation.sections import SPREAD, Drawn, view
from vtc.evaluation.sweep import SweepConfig, SweepResult

pytestmark = pytest.mark.eval


class Page(HTMLParser):
    """Tags with attributes, tables by class as rows of cells, and all text."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.tables, self.texts, self._cell = [], {}, [], None
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))
        if tag == "table":
            self._rows = []
            self.tables.setdefault(dict(attributes)["class"], []).append(self._rows)
        if tag == "tr":
            self._rows.append([])
        if tag in ("td", "th"):
            self._cell = []

    def handle_endtag(self, tag):
        if tag in ("td", "th"):
            self._rows[-1].append("".join(self._cell))
            self._cell = None

    def handle_data(self, data):
        self.texts.append(data)
        if self._cell is not None:
            self._cell.append(data)


@pytest.fixture(scope="module")
def text(swept):
    return swept.report.read_text()


@pytest.fixture(scope="module")
def page(text):
    return Page(text)


def images(page):
    return [attributes for tag, attributes in page.tags if tag == "img"]


def test_it_loads_nothing(page, text):
    assert not {"iframe", "object", "embed", "base", "source"} & {tag for tag, _ in page.tags}
    scripts = [attributes for tag, attributes in page.tags if tag == "script"]
    assert scripts == [{}]
    sources = [
        v
        for tag, a in page.tags
        for k, v in a.items()
        if k in ("src", "href", "srcset") and not v.startswith("#")
    ]
    assert sources and all(source.startswith("data:") for source in sources)
    # the namespaces of SVG are names, not places
    outside = re.sub(r'src="data:[^"]*"', "", text)
    assert "http://" not in outside and "https://" not in outside
    assert "@import" not in text and "url(" not in outside


def test_figures_load_nothing_either(page):
    for attributes in images(page):
        if attributes["src"].startswith("data:image/svg+xml"):
            links = re.findall(r"(?:href|src)='([^']*)'", attributes["src"].replace("%23", "#"))
            assert all(link.startswith("#") for link in links)


def test_every_picture_is_described(page):
    assert images(page) and all(attributes["alt"].strip() for attributes in images(page))


def test_headings_leave_out_no_level(page):
    levels = [int(tag[1]) for tag, _ in page.tags if re.fullmatch(r"h[1-6]", tag)]
    assert levels[0] == 1 and levels.count(1) == 1
    assert all(b <= a + 1 for a, b in itertools.pairwise(levels))


def test_links_lead_to_sections(page):
    ids = {attributes.get("id") for _, attributes in page.tags}
    links = [a["href"] for tag, a in page.tags if tag == "a"]
    assert links and all(link.removeprefix("#") in ids for link in links)


def test_it_names_no_folder_of_the_machine(page, model_name, swept):
    everything = "".join(page.texts)
    assert model_name not in everything and str(swept.out) not in everything
    assert "llava" in everything


def test_every_row_of_the_summary_is_in_its_table_with_its_distribution(page, swept):
    (found,) = page.tables["main"]
    columns = [*printed.COLUMNS, *SPREAD]
    assert found[0] == [*columns, "trace"]
    for cells, row in zip(found[1:], swept.summary, strict=True):
        assert cells[: len(printed.COLUMNS)] == printed.cells(row)
        kept = swept.samples[
            (swept.samples["label"] == row["label"])
            & (swept.samples["keep"] == row["keep"])
            & (swept.samples["positions"] == row["positions"])
        ]["kept_fraction"]
        shares = [100 * kept.quantile(q) for q in (0, 0.2, 0.5, 0.8, 1)]
        assert [float(c) for c in cells[len(printed.COLUMNS) : -1]] == pytest.approx(
            shares, abs=0.06
        )


def test_every_trace_finds_its_row_alone(page, swept, monkeypatch, capsys):
    from vtc import cli

    monkeypatch.chdir(swept.out)
    (found,) = page.tables["main"]
    commands = [cells[-1].removeprefix("copy").strip() for cells in found[1:]]
    assert len(set(commands)) == len(commands)
    for command, row in list(zip(commands, swept.summary, strict=True))[:6]:
        program, *arguments = shlex.split(command)
        assert program == "vtc"
        assert cli.main([*arguments, "--json"]) == 0
        (traced,) = json.loads(capsys.readouterr().out)
        assert traced["row"]["accuracy"] == row["accuracy"] and traced["differences"] == []


def test_every_trace_of_an_area_finds_its_row_alone(page, swept, monkeypatch, capsys):
    from vtc import cli

    monkeypatch.chdir(swept.out)
    (found,) = page.tables["ranks"]
    for cells, row in list(zip(found[1:], swept.ranking, strict=True))[:2]:
        program, *arguments = shlex.split(cells[-1].removeprefix("copy").strip())
        assert program == "vtc"
        assert cli.main([*arguments, "--json"]) == 0
        (traced,) = json.loads(capsys.readouterr().out)
        assert traced["row"]["area"] == row["area"] and traced["differences"] == []


def test_the_ranking_is_that_of_the_result(page, swept):
    (found,) = page.tables["ranks"]
    assert [cells[:2] for cells in found[1:]] == [
        [printed.name(row), row["positions"]] for row in swept.ranking
    ]
    for cells, row in zip(found[1:], swept.ranking, strict=True):
        assert cells[2].startswith(f"{100 * row['area']:.1f} [")


def test_accuracy_by_kind_is_there_for_every_method_at_every_keep(page, swept):
    frame = swept.samples
    kinds = sorted(frame["kind"].unique())
    shown = [a for tag, a in page.tags if tag == "div" and "data-keep" in a]
    assert [a["data-keep"] for a in shown] == ["0.33", "0.11"]
    # one is shown first, all can be chosen
    assert ["hidden" in a for a in shown] == [True, False]
    options = [a["value"] for tag, a in page.tags if tag == "option"]
    assert options == ["0.33", "0.11"]
    for keep, found in zip(("0.33", "0.11"), page.tables["heat"], strict=True):
        assert found[0] == ["method", "kept", "active", *(f"{k}{_count(frame, k)}" for k in kinds)]
        for cells in found[1:]:
            label = "none" if cells[0] == "full model" else cells[0]
            own = frame[(frame["label"] == label) & (frame["positions"] == "keep")]
            own = own[own["keep"].isin([keep, "1.0"])]
            means = [own[own["kind"] == kind]["score"].mean() for kind in kinds]
            assert cells[3:] == [f"{100 * mean:.0f}" for mean in means]


def _count(frame, kind):
    full = frame[frame["label"] == "none"]
    return int((full["kind"] == kind).sum())


def strips(text, name):
    """The pictures of every strip of that name."""
    parts = text.split(f'<div class="strip {name}">')[1:]
    return [
        re.findall(r'<img src="([^"]*)" alt="([^"]*)"', p.partition("</div>")[0]) for p in parts
    ]


def test_every_method_is_drawn_over_every_picture(text, swept):
    methods = [printed.name(row) for row in rows_to_show(swept.summary, "vtc_scenes")]
    found = strips(text, "kept")
    assert [[alt.partition(":")[0] for _, alt in strip] for strip in found] == [methods] * 2
    for strip in found:
        drawn = [base64.b64decode(src.partition(",")[2]) for src, _ in strip]
        for data in drawn:
            with Image.open(io.BytesIO(data)) as image:
                assert image.size == (288, 288)
        by_name = dict(zip(methods, drawn, strict=True))
        # a smaller picture has the grid that pooling makes: the same cells go together
        assert by_name.pop("downsample") == by_name["average_pool"]
        assert len(set(by_name.values())) == len(by_name)


def test_scores_stand_beside_what_was_kept(text):
    found = strips(text, "scores")
    names = [[alt.partition(":")[0] for _, alt in strip] for strip in found]
    assert names == [["Scores of vtc_cls", "Scores of random"]] * 2


def test_answers_under_the_pictures_are_those_that_were_scored(text, swept):
    frame = swept.samples
    full = frame[frame["label"] == "none"].drop_duplicates("kind").head(2)
    marks = []
    for strip in text.split('<div class="strip kept">')[1:]:
        marks += re.findall(r"([✓✗] [^<]*)</span>", strip.partition("</div>")[0])
    found = []
    for sample in full.to_dict("records"):
        assert sample["question"] in text
        for row in rows_to_show(swept.summary, "vtc_scenes"):
            same = (frame["label"] == row["label"]) & (frame["keep"] == row["keep"])
            same &= (frame["doc_id"] == sample["doc_id"]) & (frame["positions"] == row["positions"])
            one = frame[same].iloc[0]
            found.append(f"{'✓' if one['score'] else '✗'} {one['answer']}")
    assert marks == found


def test_it_says_how_it_was_made(page):
    everything = "".join(page.texts)
    assert "vtc sweep --questions 16" in everything
    assert "guessing" in everything and "transformers" in everything


@pytest.fixture
def page_of(samples_frame):
    """The page of samples made by hand: scores by (model, task), and what was drawn of all."""

    def build(scores, drawn):
        methods = (("none", "keep", None, 0), ("random", "keep", 0.5, 0))
        cells = [
            samples_frame(dict.fromkeys(methods, own), task=task, model=model)
            for (model, task), own in scores.items()
        ]
        frame = pd.concat(cells, ignore_index=True)
        rows, summary = table.tables(frame)
        result = SweepResult(rows, summary, [], Path("out"), (), frame)
        charts = report._charts(result, "a machine")
        views = [
            view(
                own,
                report._of(summary, *key),
                [],
                drawn,
                parameters="1",
                chance=None,
                charts=charts,
            )
            for key, own in zip(scores, cells, strict=True)
        ]
        return Page(report._page(SweepConfig(), result, views, {}))

    return build


def test_numbers_of_questions_are_those_of_all_tasks(page_of):
    several = {("m", "t"): [1, 0, 1, 1], ("m", "u"): [1, 0, 1, 0, 1, 0]}
    assert "4 to 6 questions each" in "".join(page_of(several, Drawn()).texts)
    several["m", "u"] = several["m", "t"]
    assert " 4 questions each" in "".join(page_of(several, Drawn()).texts)


def test_what_others_wrote_is_text(page_of):
    wild = """<img src=x onerror="alert('1')"> & </script>"""
    picture = Image.new("RGB", (8, 8))
    shown = [Shown(wild, picture, picture, wild, True, wild)]
    drawn = Drawn([Example(wild, wild, wild, shown)], shown)
    page = page_of({(f"m{wild}", f"t{wild}"): [1, 0, 1, 1]}, drawn)
    assert not [a for tag, a in page.tags if tag == "img" and not a["src"].startswith("data:")]
    assert not [name for _, a in page.tags for name in a if name.startswith("on")]
    # title of the page and of the model, question, target, kind, method, answer and share
    assert "".join(page.texts).count(wild) > 8
    alts = [a["alt"] for _, a in page.tags if a.get("alt", "").endswith(f": {wild}")]
    assert alts == [f"{wild}: {wild}", f"Scores of {wild}: {wild}"]


def test_a_phone_can_show_it(page, text):
    names = {a.get("name"): a.get("content") for tag, a in page.tags if tag == "meta"}
    assert names["viewport"] == "width=device-width, initial-scale=1"
    # whatever is wider than a phone scrolls by itself, with the keyboard too
    for name in ("main", "heat", "ranks"):
        before = text[: text.index(f'<table class="{name}">')].rstrip()
        assert re.search(r'<div class="scroll" tabindex="0" role="region" [^>]*>$', before)


def test_lists_of_files_are_words_in_the_csv(swept):
    table = pd.read_csv(swept.out / "table.csv")
    for cells, row in zip(table["cells"], swept.rows, strict=True):
        assert cells.split(" ") == row["cells"]
