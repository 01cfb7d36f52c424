"""What the scripts in `benchmarks/` have in common: arguments, the file of rows, printing."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from vtc.bench.rows import Store
from vtc.bench.stamp import commit, machine, stamp
from vtc.bench.tables import Table
from vtc.commands import models
from vtc.commands.files import table

ROWS = "rows.jsonl"


def parser(doc: str | None, results: Path) -> argparse.ArgumentParser:
    """Arguments that all have.

    Args:
        doc: of the script; its first line is shown.
        results: the folder of its rows.
    """
    made = argparse.ArgumentParser(description=(doc or "").split("\n")[0])
    made.set_defaults(results=results)
    out = f"folder of {ROWS}; rows that are there already are replaced by what is measured anew"
    made.add_argument("--out", type=Path, help=f"{out} (default: {results}; with --tiny: none)")
    made.add_argument("--tiny", action="store_true", help="toy shapes, to try the script")
    made.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    made.add_argument("--commit", default=commit(), help="of the code, where git is not there")
    return made


def listed(text: str) -> tuple[str, ...]:
    """Names separated by commas."""
    return tuple(name for name in text.split(",") if name)


def one_of(known: Sequence[str]) -> Callable[[str], tuple[str, ...]]:
    """A type for names separated by commas, all of them known."""

    def parse(text: str) -> tuple[str, ...]:
        names = listed(text)
        if unknown := [name for name in names if name not in known]:
            raise argparse.ArgumentTypeError(
                f"got {', '.join(unknown)}, expected of {', '.join(known)}"
            )
        return names

    return parse


def numbers(text: str) -> tuple[int, ...]:
    """Whole numbers separated by commas."""
    return tuple(map(int, listed(text)))


def rows_file(args: argparse.Namespace) -> Path | None:
    """Where rows go; toy rows go nowhere unless they are told to."""
    folder: Path | None = args.out or (None if args.tiny else args.results)
    return None if folder is None else folder / ROWS


def store(args: argparse.Namespace) -> Store:
    """The rows of a run."""
    models.quiet()
    return Store(rows_file(args), stamp(args.device, args.commit))


def show(args: argparse.Namespace, made: Table) -> None:
    """Print a table, with the machine and whether its times mean anything."""
    toys = ": toy shapes, these times say nothing about speed" if args.tiny else ""
    print(f"{machine(args.device)}, torch {torch.__version__}{toys}\n\n{table(made)}")
