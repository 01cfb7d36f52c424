"""A mistake in the files of recipes is one error that says where and what, when they are read."""

from __future__ import annotations

import copy
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import vtc.recipes
from vtc.errors import VtcError
from vtc.recipes.data import checked, data

FOLDER = Path(vtc.recipes.__file__).parent
Files = list[dict[str, Any]]


def files() -> Files:
    """Models, settings and tables as they are installed."""
    names = ("models.toml", "settings.toml", "tables.toml")
    return [tomllib.loads((FOLDER / name).read_text("utf-8")) for name in names]


GOOD = files()


def first(files: Files, what: str) -> Any:
    """The first setting or table."""
    return files[1]["setting"][0] if what == "setting" else files[2]["table"][0]


MISTAKES: dict[str, tuple[Callable[[Files], Any], str]] = {
    "no unit": (lambda f: first(f, "table").pop("unit"), "table 1: got no unit"),
    "unit of no column": (
        lambda f: first(f, "table").update(units={"GQB": "points"}),
        "table 1: got a unit of 'GQB'",
    ),
    "no lineage": (lambda f: first(f, "table").pop("lineage"), "table 1: got no lineage"),
    "unknown lineage": (
        lambda f: first(f, "table").update(lineage="mine"),
        "table 1: got lineage 'mine', expected one of vtr-calib",
    ),
    "lineage without a title": (
        lambda f: f[2]["lineage"]["std"].pop("title"),
        "lineage std: got no title",
    ),
    "unknown model": (lambda f: first(f, "table").update(model="llava"), "got model 'llava'"),
    "a number too many": (
        lambda f: first(f, "table")["rows"][0].append(1.0),
        "got 9 numbers, expected 8",
    ),
    "text for a number": (
        lambda f: first(f, "table")["rows"][0].__setitem__(2, "96.0*"),
        "got '96.0*', expected a number or '-'",
    ),
    "truth for a number": (
        lambda f: first(f, "table")["full"].__setitem__(0, True),
        "full: got True",
    ),
    "a row twice": (
        lambda f: first(f, "table")["rows"].append(first(f, "table")["rows"][0]),
        "a second time, expected it once",
    ),
    "unknown method": (
        lambda f: first(f, "table")["rows"][0].__setitem__(1, "fastw"),
        "expected a budget and a registered method",
    ),
    "no setting": (
        lambda f: first(f, "table")["rows"].append([64, "paint", *[1] * 8]),
        "no setting of ('paint', 'llava15')",
    ),
    "no keep": (
        lambda f: first(f, "table")["rows"].append([96, "sparsevlm", *[1] * 8]),
        "got no keep for 96",
    ),
    "unused setting": (
        lambda f: first(f, "setting")["models"].append("qwen3vl"),
        "got a setting for ('fastv', 'qwen3vl'), of which there is no row",
    ),
    "a setting twice": (
        lambda f: f[1]["setting"].append(first(f, "setting")),
        "('fastv', 'llava15') a second time",
    ),
    "unknown key": (
        lambda f: first(f, "setting").update(option={}),
        "setting 1: got key 'option', expected one of method",
    ),
    "unknown convention": (
        lambda f: first(f, "setting").update(counts="mean"),
        "setting 1: got counts='mean'",
    ),
    "layers as text": (lambda f: f[0]["llava15"].update(layers="32"), "llava15: got layers='32'"),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_is_found(name: str) -> None:
    broken = copy.deepcopy(GOOD)
    MISTAKES[name][0](broken)
    with pytest.raises(VtcError) as error:
        checked(*broken)
    message = str(error.value)
    assert MISTAKES[name][1] in message and ".toml: " in message and "\n" not in message
    assert message.endswith("correct that file")


def test_the_installed_files_have_none_and_are_read_once() -> None:
    assert checked(*GOOD) == data() is data()


def test_options_are_those_of_the_methods_and_positions_one_of_four() -> None:
    for setting in data().settings.values():
        method = vtc.method(setting.method, **setting.options)
        assert {*setting.places} <= {*vars(method)}
        assert setting.positions in ("keep", "renumber", "median", "published")


def test_tasks_are_named_for_columns_that_exist() -> None:
    columns = {column for table in data().tables for column in table.columns}
    assert {*data().tasks} - {"SEED"} <= columns


@pytest.mark.eval
def test_tasks_are_lmms_evals() -> None:
    tasks = pytest.importorskip("lmms_eval.tasks")
    folder = Path(tasks.__file__).parent
    known = {
        line.partition(":")[2].strip().strip("'\"")
        for file in folder.rglob("*.yaml")
        for line in file.read_text("utf-8").splitlines()
        if line.startswith(("task:", "group:"))
    }
    wanted = {task for task in data().tasks.values() if task}
    assert wanted <= known, wanted - known
