"""The site is built without a warning, asks no other machine for anything, and tells the truth."""

from __future__ import annotations

import ast
import importlib
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import fields
from html import unescape
from html.parser import HTMLParser
from pathlib import Path
from types import ModuleType
from urllib.parse import unquote

import pytest

import vtc
from vtc import errors
from vtc.methods.base import Method

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
WRITTEN = sorted(p for p in DOCS.rglob("*.md") if p != DOCS / "methods.md")

pytest.importorskip("mkdocs", reason="needs the docs extra")


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(out)]
    offline = os.environ | {"NO_MKDOCS_2_WARNING": "1", "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        command, cwd=ROOT, env=offline, capture_output=True, text=True, timeout=500
    )
    assert done.returncode == 0, done.stderr
    assert "WARNING" not in done.stderr + done.stdout
    return out


@pytest.fixture(scope="module")
def generator() -> Iterator[ModuleType]:
    sys.path.insert(0, str(DOCS / "_generate"))
    try:
        yield importlib.import_module("message_page")
    finally:
        sys.path.pop(0)


class Loads(HTMLParser):
    """What a page loads by itself, and what it links to."""

    def __init__(self) -> None:
        super().__init__()
        self.loaded: list[str] = []
        self.linked: list[str] = []
        self.alone: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        found = {name: value or "" for name, value in attrs}
        if "src" in found:
            self.loaded.append(found["src"])
        if tag == "link" and found.get("rel") not in ("next", "prev", "canonical"):
            self.loaded.append(found["href"])
        if tag == "a" and "href" in found:
            self.linked.append(found["href"])
        if tag == "img" and not found.get("alt"):
            self.alone.append(found.get("src", ""))


def test_pages_load_nothing_from_elsewhere_and_links_lead_somewhere(site: Path) -> None:
    pages = sorted(site.rglob("*.html"))
    assert len(pages) > 20
    for page in pages:
        if page.name == "404.html":
            continue
        found = Loads()
        found.feed(page.read_text())
        for name in (*found.loaded, *found.linked):
            if name in found.linked and name.startswith("https://"):
                continue
            assert "//" not in name and not name.startswith("http:"), (page.name, name)
            target = unquote(name.partition("#")[0].partition("?")[0])
            assert not target or (page.parent / target).exists(), (page.name, name)
        assert not found.alone, (page.name, found.alone)
    for sheet in site.rglob("*.css"):
        assert not re.search(r"url\(['\"]?(https?:)?//", sheet.read_text()), sheet


def test_every_method_has_a_page_with_its_options_paper_and_curve(site: Path) -> None:
    for name in vtc.methods():
        page = (site / "methods" / f"{name}.html").read_text()
        method = vtc.method(name)
        for field in fields(method):
            if field.repr and field.name not in Method.__dataclass_fields__:
                assert f"<code>{field.name} = " in page, f"{name} does not have {field.name}"
        assert not re.search(r"<dd>\s*(<p>)?–", page), f"{name} does not say what an option is"
        assert ("How to cite it" in page) == bool(method.bibtex)
        drawn = (site / "methods" / f"{name}.svg").exists()
        assert drawn != ("No committed table has it yet" in page)
    assert (site / "methods" / "vtc_cls.svg").exists()


def test_generated_pages_are_complete(site: Path, generator: ModuleType) -> None:
    command_page = importlib.import_module("command_page")
    page = (site / "reference" / "commands.html").read_text()
    for name, parser in command_page.commands().items():
        assert f"vtc {name}" in page
        for action in command_page.options(parser):
            assert (action.option_strings or [action.dest])[-1] in page
    python = (site / "reference" / "python.html").read_text()
    for name in set(vtc.__all__) - {"VtcError", "errors"}:
        assert re.search(rf'id="vtc\.{name}"', python), f"{name} is missing in docs/reference"
    notebooks = {p.stem for p in (ROOT / "notebooks").glob("*.ipynb")}
    assert notebooks == {p.stem for p in (site / "notebooks").glob("*.html")}


def test_messages_are_explained_and_exist(generator: ModuleType) -> None:
    text = (DOCS / "troubleshooting.md").read_text()
    classes = list(generator.classes())
    assert "VtcError" in classes and len(classes) >= 9
    for name in set(classes) - {"VtcError"}:
        assert f"## {name}: " in text, f"troubleshooting says nothing about {name}"
    known = {(m.error, " ".join(m.text.split())) for m in generator.messages(ROOT)}
    assert len(known) > 200
    error = ""
    for line in text.splitlines():
        if found := re.match(r"## (\w+): ", line):
            error = found[1]
        if found := re.match(r'### "(.+)"$', line):
            assert (error, found[1]) in known, f"no {error} says {found[1]!r}"


def test_all_raised_messages_are_found(generator: ModuleType) -> None:
    tree = ast.parse(
        "raise OptionError(f'got {x}, '\n f'expected one')\n"
        "raise vtc.errors.InputError('a' + f'{b}')\n"
        "raise ValueError('not ours')\nraise OptionError(made_elsewhere)\nraise\n"
    )
    assert set(generator._of(tree)) == {
        generator.Message("OptionError", "got …, expected one"),
        generator.Message("InputError", "a…"),
    }
    assert set(generator.classes()) == {
        c.__name__
        for c in vars(errors).values()
        if isinstance(c, type) and issubclass(c, vtc.VtcError)
    }


def test_docstrings_stay_text(generator: ModuleType) -> None:
    prose = importlib.import_module("prose")
    markdown = pytest.importorskip("markdown").markdown
    said = "s[j] = Σ_l A_l[h, CLS] * x_1*x_2 <b> &amp; `a[*]_b_` | # c"
    for text in (said, f"# {said}", f"1 > {said}"):
        seen = re.sub("<[^>]*>", "", markdown(prose.escaped(text)))
        assert unescape(seen).strip() == text.replace("`", "")
    linked = prose.linked("A paper (arXiv 2412.05819v2; official code A/b.c).")
    assert "(https://arxiv.org/abs/2412.05819)" in linked
    assert "[A/b.c](https://github.com/A/b.c))." in linked


def code_of(path: Path) -> str:
    """What a page's blocks of Python say, one behind the other."""
    blocks = re.findall(r"^```python\n(.*?)^```", path.read_text(), re.MULTILINE | re.DOTALL)
    return "\n".join(b for b in blocks if not b.startswith("# not run here"))


@pytest.mark.parametrize("path", [p for p in WRITTEN if code_of(p)], ids=lambda p: p.stem)
def test_code_in_pages_runs(path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    # dataclasses look their module up by its name
    module = ModuleType(f"page_{path.stem}")
    monkeypatch.setitem(sys.modules, module.__name__, module)
    exec(compile(code_of(path), str(path), "exec"), vars(module))
