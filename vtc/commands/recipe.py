"""`vtc recipe`: the settings of a published row, its numbers and how to cite it."""

from __future__ import annotations

import argparse
import json
import textwrap

from vtc.commands.files import table
from vtc.errors import OptionError
from vtc.evaluation.compression import label
from vtc.recipes import Recipe, Result, names, recipe
from vtc.recipes.row import COUNTS

_WIDTH = 100
_HARNESS = (
    "Numbers of two lineages do not compare, nor do those of this command with either: prompts "
    "and scores are lmms-eval's."
)


def run(args: argparse.Namespace) -> int:
    """Print one recipe or the list of all."""
    if args.name is not None:
        if args.method or args.model:
            raise OptionError(
                f"recipe {args.name!r} was given with --method or --model, expected a name or these"
                " filters of the list: leave one of them out"
            )
        found = recipe(args.name)
        print(json.dumps(found.to_dict(), indent=2) if args.json else _one(found))
        return 0
    rows = _filtered(args.method, args.model)
    if args.json:
        print(json.dumps([row.to_dict() for row in rows], indent=2))
        return 0
    print(_list(rows))
    return 0


def _filtered(method: str | None, model: str | None) -> list[Recipe]:
    """Recipes of a method, of a model, or all."""
    found = [recipe(name) for name in names()]
    for what, wanted, of in (
        ("method", method, [row.method for row in found]),
        ("model", model, [row.model.slug for row in found]),
    ):
        if wanted is not None and wanted not in of:
            known = ", ".join(dict.fromkeys(of))
            raise OptionError(f"there is no recipe of {what} {wanted!r}, expected one of {known}")
    return [
        row for row in found if method in (None, row.method) and model in (None, row.model.slug)
    ]


def _list(rows: list[Recipe]) -> str:
    columns = ["recipe", "keep", "budget counts", "built", "lineages"]
    body = [
        [
            row.name,
            "-" if row.setting.refused else str(row.keep),
            row.setting.counts,
            _built(row),
            ", ".join(dict.fromkeys(result.lineage.key for result in row.results)),
        ]
        for row in rows
    ]
    means = "\n".join(f"{name:<10}  {words}" for name, words in COUNTS.items())
    return (
        f"{table([columns, *body])}\n\nbudget counts:\n{means}\n"
        "built: yes; open: something is chosen that the publication leaves open; deviates:\n"
        "       something is done otherwise than published; no. The recipe says what and why\n"
        "`vtc recipe NAME` prints one."
    )


def _built(row: Recipe) -> str:
    if row.setting.refused:
        return "no"
    return "deviates" if row.deviates else "open" if row.setting.unstated else "yes"


def _one(found: Recipe) -> str:
    """A recipe for people."""
    model, setting = found.model, found.setting
    of = f", {found.tokens} visual tokens" if found.tokens else ""
    facts = [
        ("model", f"{model.id} ({model.title}{of})"),
        ("budget", f"{found.budget}: {COUNTS[setting.counts]}"),
    ]
    if setting.refused:
        facts.append(("not built", setting.refused))
    else:
        keep = "left out" if found.keep is None else f"{found.keep}"
        facts += [
            ("method", label(found.method, found.options)),
            ("keep", f"{keep}; {setting.follows}"),
            ("positions", _positions(found)),
        ]
        if spans := _spans(found):
            facts.append(("layers", spans))
    facts += [("deviates", words) for words in found.deviates if not setting.refused]
    facts += [("unstated", words) for words in setting.unstated]
    parts = [found.name, "\n".join(_fact(name, words) for name, words in facts)]
    if not setting.refused:
        # what is to be copied is not wrapped
        parts += [found.call, f'vtc.recipe("{found.name}").patch(model)', found.command]
        if not found.tasks:
            parts.append("No benchmark of these numbers has a task there: pope stands for them.")
        if found.paid:
            parts.append(f"Not in it, because it asks a paid service: {', '.join(found.paid)}.")
    parts += [_published(result) for result in found.results]
    parts += [textwrap.fill(_HARNESS, _WIDTH), found.bibtex]
    return "\n\n".join(part for part in parts if part)


def _fact(name: str, words: str) -> str:
    indent = " " * 11
    return textwrap.fill(
        words,
        _WIDTH,
        initial_indent=f"{name:<11}",
        subsequent_indent=indent,
        break_on_hyphens=False,
    )


def _positions(found: Recipe) -> str:
    if found.positions != "published":
        return found.positions
    return f"published ({found.build().published_positions})"


def _spans(found: Recipe) -> str:
    """How many tokens decoder layers see, and the average."""
    spans = found.spans()
    total = sum((last - first + 1) * tokens for first, last, tokens in spans)
    said = ", ".join(
        f"{tokens} tokens in {f'{first}–{last}' if last > first else first}"
        for first, last, tokens in spans
    )
    return f"{said}: {total / found.model.layers:.1f} on average" if spans else ""


def _published(result: Result) -> str:
    """The numbers of one lineage as a table."""
    lines = [textwrap.fill(f"{result.lineage.title} — {result.lineage.kind}", _WIDTH)]
    lines += [textwrap.fill(note, _WIDTH) for note in result.notes]
    body = [
        [n.benchmark, str(n.value), "-" if n.full is None else str(n.full), n.unit]
        for n in result.numbers
    ]
    return "\n".join([*lines, table([["", "published", "full model", "unit"], *body])])
