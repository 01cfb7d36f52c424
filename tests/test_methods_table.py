"""docs/methods.md is what the registry says now."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

import vtc
from vtc.adapters.registry import ADAPTERS
from vtc.calibration import Calibration
from vtc.cli import main
from vtc.commands import support
from vtc.methods.base import Method
from vtc.runtime.tower import facts_of

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
    for name in ("flowcut", "todre", "vtc_cls", *sorted(CALIBRATED)):
        assert vtc.method(name).bibtex.count("@") == 1
        assert "title={" in vtc.method(name).bibtex


# what each method of a paper that looks at the language model must be told about it
CALIBRATED = {"naavit", "shortv", "yopo", "sink_removal", "var"}


def on_families(method: Method) -> dict[str, support.Support]:
    names, adapters = support.family_names(), support.skeletons()
    return {n: support.support(method, a) for n, a in zip(names, adapters, strict=True)}


def test_a_missing_calibration_is_not_a_refusal() -> None:
    published = {
        "naavit": {"LLaVA-1.5", "LLaVA-NeXT"},
        "shortv": {"LLaVA-1.5", "LLaVA-NeXT"},
        "yopo": set(),
        "sink_removal": {"LLaVA-1.5", "LLaVA-NeXT"},
        "var": {"LLaVA-1.5", "LLaVA-NeXT"},
    }
    for name in vtc.methods():
        for family, found in on_families(vtc.method(name)).items():
            assert found.where and not found.refused
            waits = name in CALIBRATED and family not in published[name]
            assert bool(found.needs) == (support.NEEDS in found.notes) == waits
            if waits:
                assert "vtc calibrate" in found.needs and "expected" not in str(found)


def test_layers_are_those_of_the_plan_that_patch_would_make() -> None:
    adapter = support.skeletons()[0]
    words = str(support.support(vtc.method("shortv"), adapter))
    # ShortV's order for LLaVA-1.5-7B (methods-core.md): the 16 of 32 that come first
    first = sorted([31, 29, 30, 28, 0, 26, 27, 25, 24, 22, 23, 21, 2, 3, 20, 18])
    assert first == [0, 2, 3, 18, *range(20, 32)]
    assert words == "visual rows: frozen in layers 0, 2–3, 18, 20–31 of 32 at keep=0.5"
    given = vtc.method("naavit", layers=(5, 1, 2, 3))
    words = str(support.support(given, adapter))
    assert words == "visual rows: no attention in layers 1–3, 5 of 32"


def test_what_is_refused_with_any_calibration_is_refused() -> None:
    outside = vtc.method("var", dims=(5000,))
    for family, found in on_families(outside).items():
        width = support.skeletons()[support.family_names().index(family)]
        if facts_of(width).llm_width <= 5000:
            assert "got dims=(5000,)" in found.refused and not found.needs and not found.where


def test_a_model_without_sinks_leaves_nothing_to_do() -> None:
    none = Calibration(sink_dims=())
    for name in ("var", "sink_removal"):
        found = support.support(vtc.method(name, calibration=none), support.skeletons()[0])
        assert str(found) == support.NOWHERE


def test_on_a_model_each_method_says_its_layers_or_the_calibration_it_lacks(capsys) -> None:
    from vtc.testbed import model_folder

    assert main(["methods", "--model", str(model_folder()), "--json"]) == 0
    rows = {row["method"]: row for row in json.loads(capsys.readouterr().out)}
    assert rows["ima_skip"]["reads"] == "visual rows: no FFN in layers 2, 4 of 6"
    assert all(rows[name]["needs"] == "" for name in set(rows) - CALIBRATED)
    for name in CALIBRATED:
        assert (
            rows[name]["needs"]
            or "layer" in rows[name]["reads"]
            or "nowhere" in rows[name]["reads"]
        )


@pytest.mark.parametrize(
    ("layers", "words"),
    [
        ([4], "layer 4"),
        ([0, 1], "layers 0–1"),
        ([0, 2, 3, 9], "layers 0, 2–3, 9"),
        ([2, 4, 6], "layers 2, 4, 6"),
        ([2, 4, 6, 8], "layers 2, 4, …, 8"),
        ([1, 2, 3, 4], "layers 1–4"),
    ],
)
def test_layers_in_words(layers, words) -> None:
    assert support._ranges(layers) == words
