"""`vtc recipe`: everything that is known of a row is printed, and wrong use is one line."""

from __future__ import annotations

import json
from typing import Any

import pytest

from vtc.cli import main
from vtc.recipes import names, recipe


def printed(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    assert main(["recipe", *arguments]) == 0
    out, err = capsys.readouterr()
    assert err == ""
    return out


@pytest.mark.parametrize("name", names())
def test_a_recipe_is_printed_in_full(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    found, out = recipe(name), printed(capsys, name)
    words = " ".join(out.split())
    lines = out.splitlines()
    assert lines[0] == name and found.model.id in words
    for said in (*found.setting.unstated, found.setting.refused, found.bibtex):
        assert " ".join(said.split()) in words
    if not found.setting.refused:
        assert found.call in lines and found.command in lines
        assert f'vtc.recipe("{name}").patch(model)' in lines
        for said in (*found.deviates, found.setting.follows):
            assert " ".join(said.split()) in words
    for result in found.results:
        assert f"{result.lineage.title} — {result.lineage.kind}" in words
        for note in result.notes:
            assert " ".join(note.split()) in words
        for number in result.numbers:
            full = "-" if number.full is None else str(number.full)
            row = [*number.benchmark.split(), str(number.value), full, *number.unit.split()]
            assert row in [line.split() for line in lines]


def test_lines_that_are_not_copied_fit(capsys: pytest.CaptureFixture[str]) -> None:
    for name in names()[::7]:
        copied = ("vtc.patch(", "lmms-eval ")
        for line in printed(capsys, name).splitlines():
            assert len(line) <= 100 or line.startswith(copied), line


def test_the_list_has_all_and_filters_take_part_of_it(capsys: pytest.CaptureFixture[str]) -> None:
    def listed(*arguments: str) -> list[str]:
        lines = printed(capsys, *arguments).splitlines()
        return [line.split()[0] for line in lines if line.split()[:1] and line.split()[0] in known]

    known = {*names()}
    assert listed() == list(names())
    methods, models = ({getattr(recipe(n), a) for n in names()} for a in ("method", "model"))
    by_method = [name for m in sorted(methods) for name in listed("--method", m)]
    assert sorted(by_method) == sorted(known)
    by_model = [name for m in models for name in listed("--model", m.slug)]
    assert sorted(by_model) == sorted(known)
    both = listed("--method", "fastv", "--model", "llava1.5")
    assert set(both) == {*listed("--method", "fastv")} & {*listed("--model", "llava1.5")}


def test_json_says_the_same(capsys: pytest.CaptureFixture[str]) -> None:
    everything: list[dict[str, Any]] = json.loads(printed(capsys, "--json"))
    assert [one["name"] for one in everything] == list(names())
    for one in everything[::5]:
        assert json.loads(printed(capsys, one["name"], "--json")) == one
    for one in everything:
        assert (one["call"] is None) == bool(one["refused"])
        for result in one["published"]:
            assert result["lineage"]["title"]
            assert all(number["unit"] for number in result["numbers"])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["fastv-llava-64"], "did you mean fastv-llava1.5-64"),
        (["fastv-llava1.5-64", "--method", "fastv"], "expected a name or these filters"),
        (["--method", "nope"], "no recipe of method 'nope', expected one of cdpruner"),
        (["--model", "llava"], "no recipe of model 'llava', expected one of llava1.5"),
    ],
)
def test_wrong_use_is_one_line(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["recipe", *arguments]) == 2
    out, err = capsys.readouterr()
    (line,) = err.splitlines()
    assert out == "" and line.startswith("vtc: error: ") and message in line
