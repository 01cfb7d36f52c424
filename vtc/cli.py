"""The command line. Exit status: 0 done, 1 failed, 2 wrong use; an error is one line on stderr."""

from __future__ import annotations

import argparse
import ast
import importlib
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NoReturn

from vtc import __version__
from vtc.errors import InputError, OptionError, SignalError, UnsupportedModelError, VtcError
from vtc.keep import parse_keep

_WRONG_USE = (OptionError, InputError, UnsupportedModelError, SignalError)
_POSITIONS = ("keep", "renumber", "median", "published")


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        self.exit(2, _line(f"{message}; see `{self.prog} --help`") + "\n")


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit status; `argv` is without the program's name."""
    args = _parser().parse_args(argv)
    try:
        command = importlib.import_module(f"vtc.commands.{args.command}")
        status: int = command.run(args)
        sys.stdout.flush()
    except VtcError as error:
        print(_line(error), file=sys.stderr)
        return 2 if isinstance(error, _WRONG_USE) else 1
    except BrokenPipeError:
        # the reader (`head`, say) has seen enough; Python must not try to flush again
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except OSError as error:
        print(_line(error), file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print(_line("interrupted; nothing was left half-written"), file=sys.stderr)
        return 130
    return status


def _line(error: object) -> str:
    return "vtc: error: " + " ".join(str(error).split())


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(prog="vtc", description="Compress the visual tokens of multimodal LLMs.")
    parser.add_argument("--version", action="version", version=f"vtc {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for add in (_demo, _sweep, _methods, _tasks, _doctor):
        add(commands)
    return parser


def _demo(commands: Any) -> None:
    p = _command(commands, "demo", "answer a question about a picture and draw what was kept")
    p.add_argument("--model", help="folder or hub id (default: the testbed's model)")
    p.add_argument("--image", type=Path, help="a picture (default: a scene of the testbed)")
    p.add_argument("--question", help="default: the scene's own")
    p.add_argument("--scene", type=_whole(0), default=0, help="which scene (default: %(default)s)")
    p.add_argument("--method", default="vtc_cls", help="see `vtc methods` (default: %(default)s)")
    p.add_argument(
        "--option",
        type=_option,
        action="append",
        default=[],
        metavar="NAME=VALUE",
        help="an option of the method, such as start=12 (repeatable)",
    )
    p.add_argument("--keep", type=_keep, help="0.11, 64 or 64tok (default: 0.11)")
    p.add_argument("--positions", choices=_POSITIONS, default="keep")
    p.add_argument("--seed", type=_whole(0), default=0)
    p.add_argument("--device", default="auto")
    p.add_argument("--max-new-tokens", type=_whole(1), default=64)
    p.add_argument("--out", type=Path, default=Path("overlay.png"), help="(default: %(default)s)")


def _methods(commands: Any) -> None:
    p = _command(commands, "methods", "the methods and what they promise")
    p.add_argument("--model", help="folder or hub id: also show which layers they read on it")


def _tasks(commands: Any) -> None:
    what = "write the testbed's lmms-eval tasks and print their folder, nothing else"
    p = commands.add_parser("tasks", help=what, description=what)
    p.add_argument("--questions", type=_whole(1), default=2000, help="(default: %(default)s)")
    p.add_argument("--out", type=Path, help="an empty or new folder (default: a cache folder)")


def _doctor(commands: Any) -> None:
    p = _command(commands, "doctor", "versions, GPU, kernels and which models can be patched")
    p.add_argument("--model", help="folder or hub id: also say whether it can be patched")


def _sweep(commands: Any) -> None:
    _command(commands, "sweep", "methods x keep: accuracy against kept tokens, as a report")


def _command(commands: Any, name: str, what: str) -> argparse.ArgumentParser:
    parser: argparse.ArgumentParser = commands.add_parser(name, help=what, description=what)
    parser.add_argument("--json", action="store_true", help="print JSON")
    return parser


def _keep(text: str) -> float | int:
    try:
        return parse_keep(text)
    except OptionError as error:
        # argparse drops the message of a ValueError
        raise argparse.ArgumentTypeError(str(error)) from None


def _option(text: str) -> tuple[str, Any]:
    name, equals, value = text.partition("=")
    if not equals or not name.isidentifier():
        raise argparse.ArgumentTypeError(f"got {text!r}, expected NAME=VALUE such as start=12")
    try:
        return name, ast.literal_eval(value)
    except (ValueError, SyntaxError):
        return name, value


def _whole(least: int) -> Callable[[str], int]:
    def parse(text: str) -> int:
        if not text.isdecimal() or int(text) < least:
            raise argparse.ArgumentTypeError(
                f"got {text!r}, expected a whole number of at least {least}"
            )
        return int(text)

    return parse
