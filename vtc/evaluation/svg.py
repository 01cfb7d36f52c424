"""Figures for a page: an SVG made small, with a dark scheme of its own, as a data URI."""

from __future__ import annotations

import re
from urllib.parse import quote

# what is drawn dark on white, and what stands out as much on a dark page
_ON_DARK = {
    "#000000": "#e9edf2",
    "#0072b2": "#4aa8e8",
    "#332288": "#a79bff",
    "#777777": "#a3a9b1",
    "#a6a6a6": "#878d95",
    "#8c6d46": "#b8946a",
    "#dcdcdc": "#3b434d",
    "#b0b0b0": "#7d858f",
}
_PAPER = "#ffffff", "#14181d"
_COMMENTS = re.compile(r"<!--.*?-->|<\?xml.*?\?>|<!DOCTYPE[^>]*>|<metadata>.*?</metadata>", re.S)
# the scale of letters, 1/64, is not rounded
_LONG = re.compile(r"(?<!scale\()(?<![\d.])(\d+\.\d\d)\d+")
_BLANKS = re.compile(r"\s*\n\s*")
_FONTS = re.compile(r"font-family: [^;\"]*")
_TURNS = re.compile(r" transform='rotate\(-0 [^']*'")
_NAMES = re.compile(r" id='[a-z]+[\d.]*d?_\d+'")
# what may stand in a quoted attribute as it is
_SAFE = " !$&()*+,/:;=?@[]{}|~'-._\n"
_PARTS = ("fill", "stroke")


def for_page(svg: bytes) -> str:
    """A figure of matplotlib as a data URI: coordinates in hundredths of a point, light or dark.

    A picture in a page sees the reader's color scheme, so that both are in one file.
    """
    text = _FONTS.sub("font-family: system-ui, sans-serif", _COMMENTS.sub("", svg.decode()))
    text = _NAMES.sub("", _TURNS.sub("", text.replace('"', "'")))
    text = _BLANKS.sub("\n", _LONG.sub(r"\1", text)).strip()
    head = text.index(">", text.index("<svg")) + 1
    return "data:image/svg+xml," + quote(text[:head] + _style() + text[head:], safe=_SAFE)


def _style() -> str:
    """Rules for a dark page: matplotlib writes colors into each element, or none for black."""
    rules = [f"svg{{fill:{_ON_DARK['#000000']}}}"]
    for color, dark in (*_ON_DARK.items(), _PAPER):
        rules += [f"[style*='{part}: {color}']{{{part}:{dark}!important}}" for part in _PARTS]
    return f"<style>@media(prefers-color-scheme:dark){{{''.join(rules)}}}</style>"
