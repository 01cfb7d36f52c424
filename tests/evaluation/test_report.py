"""The HTML page: one file that needs nothing else, with every row, method and picture."""

import base64
import io
from html.parser import HTMLParser

import pytest
from PIL import Image

from vtc.evaluation import printed
from vtc.evaluation.pictures import rows_to_show

pytestmark = pytest.mark.eval


class Page(HTMLParser):
    """Tags with attributes, rows of cells by the class of their table, and all text."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.tables, self.texts, self._cell = [], {}, [], None
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))
        if tag == "table":
            self._rows = self.tables.setdefault(dict(attributes)["class"], [])
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
    assert not {"script", "link", "iframe", "object", "embed", "base"} & {t for t, _ in page.tags}
    sources = [v for _, a in page.tags for k, v in a.items() if k in ("src", "href", "srcset")]
    assert sources and all(source.startswith("data:image/") for source in sources)
    assert "http://" not in text and "https://" not in text
    assert "@import" not in text and "url(" not in text


def test_it_names_no_folder_of_the_machine(page, model_name):
    assert model_name not in "".join(page.texts)
    assert "llava of the testbed" in "".join(page.texts)


def test_every_row_of_the_summary_is_in_its_table(page, swept):
    expected = [printed.cells(row) for row in swept.summary]
    assert page.tables["main"] == [list(printed.COLUMNS), *expected]
    assert {"full model", "vtc_cls", "random ×2", "uniform", "average_pool", "downsample"} == {
        cells[0] for cells in expected
    }
    assert {cells[1] for cells in expected} == {"keep", "renumber"}


def test_accuracy_by_kind_is_there_for_every_method(page, swept):
    shown = [row["label"] for row in rows_to_show(swept.summary, "vtc_scenes")]
    assert shown == ["none", "vtc_cls", "random", "uniform", "average_pool", "downsample"]
    kinds = sorted(k for k in swept.summary[0] if k.startswith("accuracy_"))
    kinds = [k for k in kinds if k not in ("accuracy_low", "accuracy_high")]
    table = page.tables["heat"]
    assert table[0][:3] == ["method", "kept", "active"]
    assert table[0][3:] == [k.removeprefix("accuracy_") for k in kinds]
    for cells, row in zip(table[1:], rows_to_show(swept.summary, "vtc_scenes"), strict=True):
        assert cells[3:] == [f"{100 * row[kind]:.0f}" for kind in kinds]


def plots(page):
    drawn = [a["src"] for a in images(page) if a["src"].startswith("data:image/svg+xml;base64,")]
    return [base64.b64decode(src.partition(",")[2]) for src in drawn]


def test_the_plots_are_those_beside_it(page, swept):
    # no method acts in the LLM: against active tokens would be the first plot once more
    names = ("accuracy", "accuracy_time")
    assert plots(page) == [(swept.out / f"{name}.svg").read_bytes() for name in names]
    assert (swept.out / "accuracy_active.svg").exists()


def test_every_method_is_drawn_over_every_picture(page, swept):
    overlays = [a for a in images(page) if a["src"].startswith("data:image/jpeg;base64,")]
    methods = [printed.name(row) for row in rows_to_show(swept.summary, "vtc_scenes")]
    assert [a["alt"].partition(":")[0] for a in overlays] == methods * 2
    drawn = [base64.b64decode(a["src"].partition(",")[2]) for a in overlays]
    for data in drawn:
        with Image.open(io.BytesIO(data)) as image:
            assert image.size == (336, 336)
    # each method keeps something else
    assert len(set(drawn)) == len(drawn) - 2 or len(set(drawn)) == len(drawn)


def test_answers_under_the_pictures_are_those_that_were_scored(page, swept):
    frame = swept.samples
    texts = [text.strip() for text in page.texts]
    full = frame[frame["label"] == "none"].drop_duplicates("kind").head(2)
    for sample in full.to_dict("records"):
        assert sample["question"] in texts
    marks = [text for text in texts if text.startswith(("✓", "✗"))]
    found = []
    for doc in full["doc_id"]:
        for row in rows_to_show(swept.summary, "vtc_scenes"):
            same = (frame["label"] == row["label"]) & (frame["keep"] == row["keep"])
            one = frame[same & (frame["doc_id"] == doc) & (frame["positions"] == row["positions"])]
            one = one.iloc[0]
            found.append(f"{'✓' if one['score'] else '✗'} {one['answer']}")
    assert marks == found


def test_it_says_how_it_was_made(page):
    everything = "".join(page.texts)
    assert "vtc sweep --questions 16" in everything
    assert "guessing" in everything and "transformers" in everything


def test_a_phone_can_show_it(page, text):
    names = {a.get("name"): a.get("content") for tag, a in page.tags if tag == "meta"}
    assert names["viewport"] == "width=device-width, initial-scale=1"
    # whatever is wider than a phone scrolls by itself
    for start in ('<table class="main">', '<table class="heat">', '<img class="plot"'):
        assert text[: text.index(start)].rstrip().endswith('<div class="scroll">')
