"""The notebooks with the outputs that were stored in them."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import nbformat
from nbconvert import MarkdownExporter

_TITLE = re.compile(r"^# (.+)$", re.MULTILINE)
# what pandas puts into every table for notebooks; the site has its own
_STYLE = re.compile(r"<style scoped>.*?</style>\s*", re.DOTALL)


def paths(root: Path) -> list[Path]:
    """The notebooks, in order."""
    return sorted((root / "notebooks").glob("*.ipynb"))


def title(path: Path) -> str:
    """The heading of a notebook up to its colon."""
    found = _TITLE.search(_read(path).cells[0].source)
    return (found[1] if found else path.stem).partition(":")[0]


def pages(root: Path) -> Iterator[tuple[str, str | bytes]]:
    """A page and its pictures for each."""
    for path in paths(root):
        body, resources = MarkdownExporter().from_notebook_node(
            _read(path), {"output_files_dir": f"{path.stem}_files"}
        )
        where = f"*This is `notebooks/{path.name}`: open it in JupyterLab to run it.*\n"
        body = _STYLE.sub("", body).replace("![png](", "![the output of the cell above](")
        yield f"notebooks/{path.stem}.md", body.replace("\n", f"\n\n{where}", 1)
        for name, content in resources["outputs"].items():
            yield f"notebooks/{name}", content


def _read(path: Path) -> Any:
    return nbformat.read(path, as_version=4)
