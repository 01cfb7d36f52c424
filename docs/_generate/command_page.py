"""The command line, asked of its parser."""

from __future__ import annotations

import argparse
from collections.abc import Iterator

from prose import escaped

from vtc.cli import _parser as parser_of

HEAD = """# Command line

Exit status: 0 done, 1 failed, 2 wrong use; an error is one line on stderr. `--json` prints what a
program can read.
"""


def page() -> str:
    """The page."""
    return HEAD + "".join(_command(name, parser) for name, parser in commands().items())


def commands() -> dict[str, argparse.ArgumentParser]:
    """The commands, by name."""
    actions = parser_of()._actions
    (choices,) = (a.choices for a in actions if isinstance(a, argparse._SubParsersAction))
    return dict(choices or {})


def options(parser: argparse.ArgumentParser) -> Iterator[argparse.Action]:
    """What a command takes, without its help."""
    return (a for a in parser._actions if not isinstance(a, argparse._HelpAction))


def _command(name: str, parser: argparse.ArgumentParser) -> str:
    lines = [f"\n## `vtc {name}`\n", f"{escaped(_sentence(parser.description or ''))}\n"]
    rows = [_row(parser, action) for action in options(parser)]
    if rows:
        lines += ["| option | what |", "|---|---|", *rows, ""]
    return "\n".join(lines)


def _sentence(text: str) -> str:
    return text[:1].upper() + text[1:].rstrip(".") + "."


def _row(parser: argparse.ArgumentParser, action: argparse.Action) -> str:
    formatter = parser._get_formatter()
    value = formatter._format_args(action, formatter._get_default_metavar_for_optional(action))
    written = " ".join(filter(None, [", ".join(action.option_strings) or action.dest, value]))
    # a bar ends a cell, inside of code too
    written = written.replace("|", ", ")
    what = escaped(formatter._expand_help(action)) if action.help else ""
    return f"| `{written}` | {what} |"
