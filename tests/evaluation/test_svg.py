"""Figures in a page: small, readable on a dark page, and the same drawing."""

import re
from urllib.parse import unquote
from xml.etree import ElementTree

import pytest

from vtc.evaluation import figures, table
from vtc.evaluation.svg import for_page

pytestmark = pytest.mark.eval

CELLS = {
    ("none", "keep", None, 0): [1, 1, 1, 1],
    ("vtc_cls", "keep", 0.5, 0): [1, 1, 1, 0],
    ("random", "keep", 0.5, 0): [1, 1, 0, 0],
}


@pytest.fixture
def drawn(samples_frame):
    chart = figures.accuracy_chart(table.tables(samples_frame(CELLS))[1], {"t": 0.25})
    return chart.alone(chart.panels[0])


def numbers(text):
    return [float(n) for n in re.findall(r"(?<![\w#.])-?\d+\.?\d*(?![\w.])", text)]


def test_it_is_smaller_and_safe_in_a_quoted_attribute(drawn):
    uri = for_page(drawn)
    assert uri.startswith("data:image/svg+xml,") and '"' not in uri and "<" not in uri
    assert len(uri) < len(drawn)


def test_no_point_moves_by_more_than_a_hundredth(drawn):
    before, after = drawn.decode(), unquote(for_page(drawn).partition(",")[2])
    paths = [re.findall(r"""\bd=['"]([^'"]*)""", text) for text in (before, after)]
    assert len(paths[0]) == len(paths[1]) > 10
    for old, new in zip(*paths, strict=True):
        assert numbers(new) == pytest.approx(numbers(old), abs=0.01)


def test_it_is_xml_with_all_its_letters(drawn):
    tree = ElementTree.fromstring(unquote(for_page(drawn).partition(",")[2]))
    words = {element.text for element in tree.iter("{http://www.w3.org/2000/svg}text")}
    assert {"full model", "vtc_cls, keep", "random, keep", "guessing"} <= words


def test_every_dark_color_has_a_light_one_on_a_dark_page(drawn):
    def luminance(color):
        channels = [int(color[i : i + 2], 16) / 255 for i in (1, 3, 5)]
        linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
        return sum(w * c for w, c in zip((0.2126, 0.7152, 0.0722), linear, strict=True))

    text = unquote(for_page(drawn).partition(",")[2])
    rules = dict(re.findall(r"\[style\*='stroke: (#\w{6})'\]\{stroke:(#\w{6})", text))
    paper = luminance(rules["#ffffff"])
    # grid lines and the curves of other panels stand back on purpose
    drawn_in = set(re.findall(r"stroke: (#\w{6})", text)) - {"#ffffff", "#b0b0b0", "#dcdcdc"}
    assert drawn_in
    for color in drawn_in:
        shown = luminance(rules.get(color, color))
        # WCAG 2.2, 1.4.11: parts of graphics stand out by 3 to 1
        assert (shown + 0.05) / (paper + 0.05) >= 3, color
