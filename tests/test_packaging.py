"""The wheel: everything in it, nothing else in it, and it works in an empty folder."""

import ast
import importlib.util
import json
import os
import shutil
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
SETUPTOOLS = PROJECT["tool"]["setuptools"]
LARGEST = 45 * 2**20
EXTRAS = {"triton", "matplotlib", "lmms_eval", "datasets", "pandas", "pyarrow", "scipy", "rich"}

# an interpreter that starts with this finds none of the optional packages
HIDE = f"""
import sys
from importlib.machinery import PathFinder

class Hiding(PathFinder):
    @classmethod
    def find_spec(cls, name, path=None, target=None):
        hidden = name.partition(".")[0] in {EXTRAS}
        return None if hidden else PathFinder.find_spec(name, path, target)

sys.meta_path[sys.meta_path.index(PathFinder)] = Hiding
"""


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """Built from a copy, so that nothing that an earlier build left behind can slip in."""
    source, out = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("wheel")
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    for folder in ("vtc", "kernels", "adapters"):
        shutil.copytree(
            ROOT / folder, source / folder, ignore=shutil.ignore_patterns("__pycache__")
        )
    command = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "-q"]
    subprocess.run([*command, "-w", out, source], check=True, timeout=300)
    (built,) = out.glob("*.whl")
    return built


@pytest.fixture(scope="module")
def installed(wheel, tmp_path_factory):
    """A folder with the wheel alone, and the environment of a process that uses it."""
    target = tmp_path_factory.mktemp("installed")
    command = [sys.executable, "-m", "pip", "install", "--no-deps", "--no-index", "-q", "--target"]
    subprocess.run([*command, target, wheel], check=True, timeout=300)
    (target / "sitecustomize.py").write_text(HIDE)
    return target, os.environ | {"PYTHONPATH": str(target), "HF_HUB_OFFLINE": "1"}


def test_every_folder_with_an_init_is_a_package():
    folders = {
        ".".join([package, *init.parent.relative_to(ROOT / folder).parts])
        for package, folder in SETUPTOOLS["package-dir"].items()
        for init in (ROOT / folder).rglob("__init__.py")
    }
    assert folders == set(SETUPTOOLS["packages"])


@pytest.mark.parametrize("name", ["kernels", "adapters"])
def test_top_level_names_stay_with_their_owners(name):
    spec = importlib.util.find_spec(name)
    assert spec is None or ROOT not in Path(str(spec.origin)).parents


@pytest.mark.parametrize("folder", ["kernels", "adapters"])
def test_folders_that_transformers_may_import_do_nothing(folder):
    (docstring,) = ast.parse((ROOT / folder / "__init__.py").read_text()).body
    assert isinstance(docstring, ast.Expr) and isinstance(docstring.value, ast.Constant)


def test_nothing_puts_the_root_on_the_path():
    assert not (ROOT / "conftest.py").exists()
    assert not list((ROOT / "tests").rglob("__init__.py"))


def test_the_wheel_holds_all_code_and_data_and_nothing_else(wheel):
    names = set(zipfile.ZipFile(wheel).namelist())
    tops = {name.partition("/")[0] for name in names}
    assert {top for top in tops if not top.endswith(".dist-info")} == {"vtc"}
    wanted = {
        f"{package.replace('.', '/')}/{file.relative_to(ROOT / folder).as_posix()}"
        for package, folder in SETUPTOOLS["package-dir"].items()
        for file in (ROOT / folder).rglob("*")
        if file.is_file() and "__pycache__" not in file.parts
    }
    assert {n for n in names if n.startswith("vtc/")} == wanted
    assert "vtc/py.typed" in names
    weights = [n for n in names if n.startswith("vtc/testbed/models/llava/")]
    assert any(n.endswith(".safetensors") for n in weights), weights


def test_the_wheel_is_small(wheel):
    assert wheel.stat().st_size <= LARGEST


def test_demo_runs_from_the_wheel_in_an_empty_folder_without_extras(installed, tmp_path):
    target, environment = installed
    code = "import vtc, pathlib; print(pathlib.Path(vtc.__file__).parent.parent)"
    where = subprocess.check_output(
        [sys.executable, "-c", code], cwd=tmp_path, env=environment, text=True
    )
    assert Path(where.strip()) == target
    command = [sys.executable, target / "bin" / "vtc", "demo", "--json"]
    done = subprocess.run(
        command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["full"] and found["answer"] and found["expected"]
    assert found["report"]["llm_tokens"][0] < found["report"]["visual_tokens"][0]
    assert [file.name for file in tmp_path.iterdir()] == ["overlay.png"]
