"""Cells on disk: given back as written, and not believed when anything about them is not whole."""

import errno
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from vtc.errors import VtcError
from vtc.evaluation.store import Cells, check_writable, remove_leftovers, write

SETTINGS = {"method": "vtc_cls", "positions": "keep", "keep": 0.11, "seed": 0, "tasks": ["t"]}
TEXT = {"capture_output": True, "text": True, "check": True}
SAMPLES = [{"doc_id": i, "score": i / 3, "answer": f"ja, «{i}»\u2028\n"} for i in range(5)]


@pytest.fixture
def cells(tmp_path):
    found = Cells(tmp_path / "cells", {"vtc": "1"})
    found.save(SETTINGS, {"results": {"accuracy": 0.5}}, SAMPLES, b"masks")
    return found


def file(cells, ending):
    (found,) = cells.folder.glob(f"*{ending}")
    return found


def test_a_cell_comes_back_as_it_was_saved(cells):
    found = cells.load(SETTINGS)
    assert found["samples"] == SAMPLES
    assert found["results"] == {"accuracy": 0.5}
    assert cells.load(dict(reversed(SETTINGS.items())))["samples"] == SAMPLES


@pytest.mark.parametrize(
    "change", [{"keep": 0.5}, {"seed": 1}, {"positions": "renumber"}, {"tasks": ["t", "u"]}]
)
def test_other_settings_are_another_cell(cells, change):
    assert cells.load(SETTINGS | change) is None
    cells.save(SETTINGS | change, {}, SAMPLES[:1])
    assert cells.load(SETTINGS)["samples"] == SAMPLES


def test_one_token_and_everything_are_two_cells(cells):
    # equal numbers in Python
    cells.save(SETTINGS | {"keep": 1}, {}, SAMPLES[:1])
    cells.save(SETTINGS | {"keep": 1.0}, {}, SAMPLES[:2])
    assert len(cells.load(SETTINGS | {"keep": 1})["samples"]) == 1
    assert len(cells.load(SETTINGS | {"keep": 1.0})["samples"]) == 2


def test_another_fingerprint_does_not_see_it(cells):
    assert Cells(cells.folder, {"vtc": "2"}).load(SETTINGS) is None
    assert Cells(cells.folder, {"vtc": "1"}).load(SETTINGS) is not None


def test_half_a_file_is_not_believed(cells):
    for ending in (".samples.jsonl", ".json", ".kept.npz"):
        path = file(cells, ending)
        whole = path.read_bytes()
        for length in range(0, len(whole) - 1, 7):
            path.write_bytes(whole[:length])
            assert cells.load(SETTINGS) is None, (ending, length)
        path.unlink()
        assert cells.load(SETTINGS) is None
        path.write_bytes(whole)
    assert cells.load(SETTINGS) is not None


def test_what_an_ended_process_left_is_removed_and_nothing_else(cells):
    mine = cells.folder / f".a.json.{os.getpid()}.partial"
    ended = subprocess.run([sys.executable, "-c", "import os; print(os.getpid())"], **TEXT).stdout
    other = cells.folder / f".a.json.{ended.strip()}.partial"
    mine.touch()
    other.touch()
    remove_leftovers(cells.folder)
    assert mine.exists() and not other.exists()
    assert cells.load(SETTINGS) is not None


def test_samples_of_another_run_are_not_believed(cells):
    # stopped between the two files, and the code set back to what it was before
    path = file(cells, ".samples.jsonl")
    path.write_text(path.read_text().replace('"score": 0.0', '"score": 1.0'))
    assert cells.load(SETTINGS) is None


@pytest.mark.parametrize("content", ["null", "[]", '"text"', "{}"])
def test_json_of_something_else_is_not_believed(cells, content):
    file(cells, ".json").write_text(content)
    assert cells.load(SETTINGS) is None


@pytest.mark.parametrize("stop", [OSError(28, "No space left on device"), KeyboardInterrupt()])
@pytest.mark.parametrize("where", ["fsync", "replace"])
def test_a_stop_while_writing_leaves_the_old_file_and_nothing_else(
    tmp_path, monkeypatch, stop, where
):
    path = tmp_path / "table.csv"
    write(path, "old")

    def fail(*arguments):
        raise stop

    monkeypatch.setattr(os, where, fail)
    with pytest.raises((VtcError, KeyboardInterrupt)) as caught:
        write(path, "new")
    if isinstance(stop, OSError):
        assert "could not be written (No space left on device)" in str(caught.value)
    assert path.read_text() == "old"
    assert os.listdir(tmp_path) == ["table.csv"]


def test_the_summary_is_json_for_people_and_machines(cells):
    text = file(cells, ".json").read_text()
    assert json.loads(text)["n_samples"] == len(SAMPLES) and text.count("\n") > 5


def test_a_writable_folder_is_not_made_by_looking(tmp_path):
    check_writable(tmp_path / "a" / "b")
    check_writable(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_what_takes_no_files_is_refused(tmp_path):
    place = tmp_path / "file"
    place.write_text("mine")
    for out in (place, place / "below", place / "far" / "below"):
        with pytest.raises(VtcError, match=r"cannot be written .*expected a folder"):
            check_writable(out)
    assert place.read_text() == "mine"


def test_what_may_not_be_looked_at_is_refused(tmp_path, monkeypatch):
    def refuse(path):
        raise PermissionError(errno.EACCES, "Permission denied", str(path))

    monkeypatch.setattr(Path, "exists", refuse)
    with pytest.raises(VtcError, match=r"cannot be written \(Permission denied\)"):
        check_writable(tmp_path / "out")


def test_a_full_disk_is_refused_before_any_work(tmp_path, monkeypatch):
    usage = shutil.disk_usage(tmp_path)._replace(free=1 << 20)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    with pytest.raises(VtcError, match="has 1 MB free, expected at least 64 MB"):
        check_writable(tmp_path)
