"""docs/methods.md is what the registry says now."""

from __future__ import annotations

from pathlib import Path

import vtc
from vtc.adapters.registry import ADAPTERS
from vtc.cli import main
from vtc.commands import support

DOCS = Path(__file__).parents[1] / "docs" / "methods.md"


def test_the_table_in_the_docs_is_current() -> None:
    assert DOCS.read_text() == support.markdown(), "run `vtc methods --markdown > docs/methods.md`"


def test_every_method_and_family_has_a_cell(capsys) -> None:
    assert main(["methods", "--families"]) == 0
    lines = capsys.readouterr().out.splitlines()
    for name in vtc.methods():
        for family in support.family_names():
            assert any(line.split()[:1] == [name] and f" {family} " in line for line in lines)
    assert len(support.family_names()) == len(ADAPTERS) == 7


def test_papers_can_be_cited() -> None:
    for name in ("flowcut", "todre", "vtc_cls"):
        assert vtc.method(name).bibtex.count("@") == 1
        assert "title={" in vtc.method(name).bibtex
