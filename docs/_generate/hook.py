"""What mkdocs calls: pages that the code knows are written while the site is built."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import command_page
import message_page
import method_pages
import notebook_pages
from mkdocs.exceptions import PluginError
from mkdocs.structure.files import File, Files

ROOT = Path(__file__).parents[2]
# a line of a page that stands for a section of CONTRIBUTING.md, which is written only once
SECTION = re.compile(r"^\{\{ CONTRIBUTING: (.+) \}\}$", re.MULTILINE)


def on_config(config: Any) -> Any:
    """Put a page for each method and notebook into the navigation."""
    for part in config.nav:
        if "Methods" in part:
            part["Methods"] += [
                {group: [{name: f"methods/{name}.md"} for name in names]}
                for group, names in method_pages.groups().items()
            ]
        if "Notebooks" in part:
            part["Notebooks"] += [
                {notebook_pages.title(path): f"notebooks/{path.stem}.md"}
                for path in notebook_pages.paths(ROOT)
            ]
    return config


def on_files(files: Files, config: Any) -> Files:
    """Add the generated pages and pictures."""
    for name, content in _generated():
        files.append(File.generated(config, name, content=content))
    return files


def on_page_markdown(markdown: str, **kwargs: Any) -> str:
    """Replace `{{ CONTRIBUTING: heading }}` by that section."""
    return SECTION.sub(lambda found: _section(found[1]), markdown)


def _generated() -> Iterator[tuple[str, str | bytes]]:
    yield from method_pages.pages(ROOT)
    yield from notebook_pages.pages(ROOT)
    yield "reference/commands.md", command_page.page()
    yield "reference/messages.md", message_page.page(ROOT)


def _section(heading: str) -> str:
    text = (ROOT / "CONTRIBUTING.md").read_text()
    found = re.search(
        rf"^## {re.escape(heading)}\n(.*?)(?=^## |\Z)", text, re.MULTILINE | re.DOTALL
    )
    if found is None:
        raise PluginError(f"CONTRIBUTING.md has no section {heading!r}, expected '## {heading}'")
    return found[1].strip()
