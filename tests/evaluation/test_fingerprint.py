"""Fingerprints differ where an answer could, and nowhere else."""

import dataclasses
import shutil
from pathlib import Path

import pytest

import vtc
from vtc.evaluation.fingerprint import environment, fingerprint

pytestmark = pytest.mark.eval


@pytest.fixture
def code(tmp_path, monkeypatch):
    """A copy of the package's sources that stands for the package."""
    folder = tmp_path / "vtc"
    skip = shutil.ignore_patterns("assets", "models", "__pycache__", "adapters", "kernels")
    shutil.copytree(Path(vtc.__file__).parent, folder, ignore=skip)
    monkeypatch.setattr(vtc, "__file__", str(folder / "__init__.py"))
    return folder


def append(path):
    path.write_bytes(path.read_bytes() + b"\n# changed\n")


@pytest.mark.parametrize(
    "file",
    [
        "methods/vtc_cls.py",
        "runtime/generate.py",
        "types.py",
        "evaluation/model.py",
        "evaluation/measure.py",
        "evaluation/evaluate.py",
        "testbed/scoring.py",
    ],
)
def test_code_that_makes_answers_or_numbers(loaded, code, file):
    before = fingerprint(loaded, None)
    append(code / file)
    after = fingerprint(loaded, None)
    assert {key for key in before if before[key] != after[key]} == {"vtc"}


@pytest.mark.parametrize(
    "file", ["viz.py", "cli.py", "commands/sweep.py", "evaluation/figures.py", "testbed/render.py"]
)
def test_code_that_only_shows_them(loaded, code, file):
    before = fingerprint(loaded, None)
    append(code / file)
    assert fingerprint(loaded, None) == before


@pytest.mark.parametrize("file", ["vtc_scenes.yaml", "vtc_scenes.parquet", "scoring.py"])
def test_questions_and_how_they_are_scored(loaded, tasks_folder, tmp_path, file):
    folder = Path(shutil.copytree(tasks_folder, tmp_path / "tasks"))
    before = fingerprint(loaded, folder)
    assert before == fingerprint(loaded, tasks_folder)
    (folder / "__pycache__").mkdir(exist_ok=True)
    (folder / "__pycache__" / "scoring.cpython-399.pyc").write_bytes(b"compiled")
    assert fingerprint(loaded, folder) == before
    append(folder / file)
    assert fingerprint(loaded, folder)["questions"] != before["questions"]


def test_weights_and_processor(loaded, model_name, tmp_path):
    folder = Path(shutil.copytree(model_name, tmp_path / "model"))
    copy = dataclasses.replace(loaded, pretrained=str(folder))
    assert fingerprint(copy, None) == fingerprint(loaded, None)
    append(folder / "processor_config.json")
    assert fingerprint(copy, None)["model"] != fingerprint(loaded, None)["model"]


def test_the_environment_says_where_it_ran():
    found = environment()
    assert {"vtc", "torch", "transformers", "lmms-eval", "python", "cpu", "threads"} <= set(found)
    assert all(isinstance(value, str) and value for value in found.values())
