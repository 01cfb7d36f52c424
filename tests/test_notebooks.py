"""Every notebook runs from a fresh kernel, and what is stored in it is small and whole."""

from __future__ import annotations

import ast
import os
from functools import cache
from pathlib import Path
from typing import Any

import pytest

NOTEBOOKS = sorted((Path(__file__).parents[1] / "notebooks").glob("*.ipynb"))
STORED_BYTES = 400_000
# what each is about: seen in its text when it has run
SAYS = {
    "01_see_it": ["vtc_cls", "kept fraction", "24 of 24 right"],
    "02_compare_methods": ["vs_random_low", "todre", "downsample", "average_pool", "fails: "],
    "03_write_a_method": ["unusual", "unusual:selector=top_k", "random", "evidence_recall"],
    "04_speed": ["this machine's processor", "ttft_ms", "selector_ms", "H100", "fast"],
}
PICTURES = {"01_see_it": 2, "02_compare_methods": 6, "03_write_a_method": 1, "04_speed": 2}
WIDGET = "application/vnd.jupyter.widget-view+json"


def read(path: Path) -> Any:
    return pytest.importorskip("nbformat", reason="needs the notebook extra").read(path, 4)


@cache
def executed(path: Path, folder: Path) -> Any:
    """The notebook after a run of all its cells."""
    nbclient = pytest.importorskip("nbclient", reason="needs the notebook extra")
    book = read(path)
    client = nbclient.NotebookClient(
        book, timeout=600, kernel_name="python3", resources={"metadata": {"path": str(folder)}}
    )
    client.execute()
    return book


def outputs(book: Any) -> list[Any]:
    return [o for cell in book.cells for o in cell.get("outputs", [])]


def text(book: Any) -> str:
    """All that its outputs say."""
    shown = outputs(book)
    return "\n".join(o.get("text", "") + o.get("data", {}).get("text/plain", "") for o in shown)


def pictures(book: Any) -> int:
    return sum("image/png" in o.get("data", {}) for o in outputs(book))


def test_all_are_there() -> None:
    assert [path.stem for path in NOTEBOOKS] == list(SAYS) == list(PICTURES)


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
# jupyter's client warns about its own event loop and about missing file permissions
@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::ResourceWarning")
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_notebook_runs(path: Path, tmp_path: Path) -> None:
    book = executed(path, tmp_path)
    assert not [o for o in outputs(book) if o.output_type == "error"]
    assert not [o for o in outputs(book) if o.get("name") == "stderr"], "something was warned about"
    said = text(book)
    assert not [words for words in SAYS[path.stem] if words not in said]
    assert pictures(book) >= PICTURES[path.stem]
    if path.stem == "02_compare_methods":
        assert [o for o in outputs(book) if WIDGET in o.get("data", {})], "no widget"
    # everything that a notebook writes belongs elsewhere
    assert not os.listdir(tmp_path)


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
def test_what_is_stored_is_small_and_of_one_run(path: Path) -> None:
    assert path.stat().st_size <= STORED_BYTES
    book = read(path)
    assert not [o for o in outputs(book) if o.output_type == "error" or o.get("name") == "stderr"]
    assert pictures(book) >= PICTURES[path.stem]
    code = [cell for cell in book.cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in code] == list(range(1, len(code) + 1))
    assert not [words for words in SAYS[path.stem] if words not in text(book)]


def test_the_new_method_is_fifteen_lines() -> None:
    (path,) = [p for p in NOTEBOOKS if p.stem == "03_write_a_method"]
    tree = ast.parse(next(c.source for c in read(path).cells if "(Scorer)" in c.source))
    classes = [node for node in tree.body if isinstance(node, ast.ClassDef)]
    assert [ast.unparse(c.bases[0]) for c in classes] == ["Scorer", "Selector"]
    # a statement is a line, as is a decorator and the head of a class or function
    counted = (ast.stmt,)
    lines = sum(isinstance(node, counted) for c in classes for node in ast.walk(c))
    assert lines + sum(len(c.decorator_list) for c in classes) <= 15
