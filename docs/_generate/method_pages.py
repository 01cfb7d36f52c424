"""A page for each method, from its docstring, its fields and what the runtime says about it."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_type_hints

import curves
from prose import escaped, linked, one_line, sections

import vtc
from vtc.commands import support
from vtc.methods.base import Method

# paragraphs that tell where the code and the paper say different things
_DIFFERS = re.compile(r"(Code and paper|Where the paper leaves it open)[:.,]\s*")
_OFFICIAL = "The official code"
_GROUPS = {site: words[:1].upper() + words[1:] for site, words in support.SITES.items()}
_KEEPS = {
    "exact": "met exactly",
    "at_most": "an upper bound; the report says what was reached",
    "adaptive": "decided by the method: leave it out",
}


def names() -> list[str]:
    """All registered methods."""
    return list(vtc.methods())


def groups() -> dict[str, list[str]]:
    """The methods by where they act, baselines first."""
    found: dict[str, list[str]] = {"Baselines": [], **{g: [] for g in _GROUPS.values()}}
    for name in names():
        method = vtc.method(name)
        baseline = method.summary.startswith("baseline: ")
        found["Baselines" if baseline else _GROUPS[method.site]].append(name)
    return {group: members for group, members in found.items() if members}


def pages(root: Path) -> Iterator[tuple[str, str]]:
    """Each method's page, and its curve where there is one."""
    for name in names():
        method = vtc.method(name)
        found = curves.curve(name, method.site == "llm_rows", root)
        if found is not None:
            yield f"methods/{name}.svg", found.svg
        yield f"methods/{name}.md", _page(method, found)


def _page(method: Method, curve: curves.Curve | None) -> str:
    paragraphs = sections(type(method).__doc__)[0]
    parts = [
        f"# {method.name}",
        f"*{_sentence(method.summary)}*",
        _call(method),
        _facts(method),
        *map(_paragraph, paragraphs),
        "## Options",
        _options(method),
        "## On the testbed",
        *_drawn(method, curve),
        "## Where it works",
        _families(method),
    ]
    if method.bibtex:
        parts += ["## How to cite it", f"```bibtex\n{method.bibtex.strip()}\n```"]
    return "\n\n".join(parts) + "\n"


def _sentence(text: str) -> str:
    return escaped(text[:1].upper() + text[1:].rstrip(".") + ".")


def _call(method: Method) -> str:
    keep = {"adaptive": ""}.get(method.count, ", keep=0.11")
    comment = ""
    if method.site == "llm_rows" and keep:
        keep, comment = ", keep=0.5", "  # the share of layers in which visual rows stay active"
    if method.name == "none":
        keep = ""
    return f'```python\nhandle = vtc.patch(model, "{method.name}"{keep}){comment}\n```'


def _facts(method: Method) -> str:
    rows = [
        ("acts", support.SITES[method.site]),
        ("keep is", _KEEPS[method.count]),
        ("equals", support.EQUALS[method.exactness]),
        ("published positions:", f"`{method.published_positions}`"),
    ]
    if method._composed:
        scorer = method.active_scorer if method.active_selector.uses_scores else None
        first = [] if scorer is None else [f"scorer `{scorer.name}`"]
        rows.append(("made of", ", ".join([*first, f"selector `{method.active_selector.name}`"])))
    return "\n".join(f"- **{what}** {said}" for what, said in rows)


def _paragraph(text: str) -> str:
    found = _DIFFERS.match(text)
    if found is None and not text.startswith(_OFFICIAL):
        return linked(text)
    title, rest = (found[1], text[found.end() :]) if found else ("Code and paper", text)
    body = linked(rest[:1].upper() + rest[1:]).replace("\n", "\n    ")
    return f'!!! note "{title}"\n    {body}'


def _options(method: Method) -> str:
    hints, said, lines = get_type_hints(type(method)), _said(method), []
    parts = method._composed
    for field in dataclasses.fields(method):
        # what is not shown of it is filled in by the runtime
        if not field.repr or (field.name in Method.__dataclass_fields__ and not parts):
            continue
        default, kind = repr(getattr(method, field.name)), _type(hints[field.name])
        lines.append(f"`{field.name} = {default}` *({escaped(kind)})*")
        lines.append(f":   {one_line(said.get(field.name, '–'))}\n")
    return "\n".join(lines) or "It has none."


def _said(method: Method) -> dict[str, str]:
    """What the docstrings of its class and of those it derives from say about options."""
    found = dict[str, str]()
    for cls in reversed(type(method).__mro__):
        if issubclass(cls, Method):
            found |= sections(cls.__doc__)[1]
    return found


def _type(hint: Any) -> str:
    written = hint.__name__ if isinstance(hint, type) else str(hint)
    written = re.sub(r"\b(?:typing|vtc)\.(?:\w+\.)*", "", written)
    return re.sub(r"Literal\[([^\]]*)\]", lambda m: m[1].replace(", ", " | "), written)


def _drawn(method: Method, curve: curves.Curve | None) -> list[str]:
    if curve is None:
        return [
            "No committed table has it yet: `vtc sweep --methods " + method.name + "` makes one."
        ]
    x = "active visual rows, averaged over decoder layers" if curve.active else "tokens kept"
    tables = ", ".join(f"`{table}`" for table in curve.tables)
    return [
        '<div class="curve" markdown="1">',
        f"![Accuracy of {method.name} against {x}, beside the baselines]({method.name}.svg)",
        "</div>",
        f"Accuracy on the testbed's questions against {x}, original position ids, with 95 % "
        f"intervals of the method; from {tables}. "
        "[How methods are judged](../evaluation.md) says how to read it.",
    ]


def _families(method: Method) -> str:
    lines = ["| family | where | notes |", "|---|---|---|"]
    for family, adapter in zip(support.family_names(), support.skeletons(), strict=True):
        found = support.support(method, adapter)
        notes = "; ".join(found.notes) or "–"
        lines.append(f"| {family} | {one_line(str(found))} | {one_line(notes)} |")
    return "\n".join(lines) + (
        f"\n\nLayers are those of each family's default configuration, at keep={support.KEEP} "
        f"where the budget decides; `vtc methods --model MODEL` says them for yours."
    )
