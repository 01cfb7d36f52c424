"""Docstrings as Markdown: what would be markup stays text, papers and code become links."""

from __future__ import annotations

import html
import re
from inspect import cleandoc
from typing import Any

from griffe import Docstring

_CODE = re.compile(r"(`[^`]+`)")
_ARXIV = re.compile(r"arXiv (\d{4}\.\d{4,5})(v\d)?")
_OFFICIAL = re.compile(r"(official code:?) ([\w.-]+/[\w.-]*\w)")


def escaped(text: str) -> str:
    """Text between backticks as it is; elsewhere nothing is markup."""
    return "".join(p if i % 2 else _plain(p) for i, p in enumerate(_CODE.split(text)))


def _plain(text: str) -> str:
    # a backslash does not escape these in Markdown, and a bar would end a cell of a table
    text = html.escape(text, quote=False).replace("|", "&#124;")
    return re.sub(r"([\\*_\[\]])|(?<!&)(#)", r"\\\1\2", text)


def linked(text: str) -> str:
    """Prose with links to papers on arXiv and to official code on GitHub."""
    text = _ARXIV.sub(r"[arXiv \1\2](https://arxiv.org/abs/\1)", escaped(text))
    return _OFFICIAL.sub(r"\1 [\2](https://github.com/\2)", text)


def one_line(text: str) -> str:
    """A cell of a table."""
    return linked(" ".join(text.split()))


def sections(docstring: str | None) -> tuple[list[str], dict[str, str]]:
    """The paragraphs of a Google-style docstring, and what it says about each argument."""
    paragraphs, arguments = list[str](), dict[str, str]()
    parsed: Any = Docstring(cleandoc(docstring or "")).parse("google", warnings=False)
    for section in parsed:
        if section.kind.value == "text":
            paragraphs += section.value.split("\n\n")
        if section.kind.value in ("parameters", "other parameters"):
            arguments |= {found.name: found.description for found in section.value}
    return paragraphs, arguments
