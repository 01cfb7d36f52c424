"""The command line. Exit status: 0 done, 1 failed, 2 wrong use; an error is one line on stderr."""

from __future__ import annotations

import argparse
import dataclasses
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
_METHOD = "a name of `vtc methods`, options behind a colon: vtc_cls:start=12"
_COMPOSITION = "or several, each with its keep: flowcut@0.5+todre@0.1"
_KEEP = "0.11 (a fraction), 64 or 64tok (tokens per image)"
_POSITIONS = ("keep", "renumber", "median", "published")


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        self.exit(2, _line(f"{message}; see `{self.prog} --help`") + "\n")


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit status; `argv` is without the program's name."""
    given = list(sys.argv[1:] if argv is None else argv)
    args = _parser().parse_args(given, argparse.Namespace(argv=given))
    try:
        command = importlib.import_module(f"vtc.commands.{args.verb}")
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
    commands = parser.add_subparsers(dest="verb", required=True, metavar="COMMAND")
    for add in (_demo, _sweep, _trace, _calibrate, _bench, _methods, _recipe, _tasks, _doctor):
        add(commands)
    return parser


def _demo(commands: Any) -> None:
    p = _command(commands, "demo", "answer a question about a picture and draw what was kept")
    p.add_argument("--model", help="folder, hub id, or a model of the testbed (default: llava)")
    p.add_argument("--image", type=Path, help="a picture (default: a scene of the testbed)")
    p.add_argument("--question", help="default: the scene's own")
    p.add_argument("--scene", type=_whole(0), default=0, help="which scene (default: %(default)s)")
    p.add_argument("--method", default="vtc_cls", help=_METHOD + " (default: %(default)s)")
    p.add_argument("--keep", type=_keep, help=_KEEP + "; default: 0.11")
    p.add_argument("--positions", choices=_POSITIONS, default="keep")
    p.add_argument("--seed", type=_whole(0), default=0)
    p.add_argument("--device", default="auto")
    p.add_argument("--max-new-tokens", type=_whole(1), default=64)
    p.add_argument("--out", type=Path, default=Path("overlay.png"), help="(default: %(default)s)")


def _methods(commands: Any) -> None:
    p = _command(commands, "methods", "the methods and what they promise")
    p.add_argument("--families", action="store_true", help="on which family each works, and where")
    p.add_argument("--markdown", action="store_true", help="both as docs/methods.md has them")
    p.add_argument("--model", help="folder or hub id: also show which layers they read on it")


def _recipe(commands: Any) -> None:
    what = "the settings of a published row, and its numbers by lineage; without a name, all rows"
    p = _command(commands, "recipe", what)
    p.add_argument("name", nargs="?", metavar="NAME", help="such as fastv-llava1.5-64")
    p.add_argument("--method", help="list rows of this method alone")
    p.add_argument("--model", help="list rows of this model alone, such as llava1.5")


def _tasks(commands: Any) -> None:
    what = "write lmms-eval tasks and print their folder: the testbed's, or of local benchmark data"
    p = commands.add_parser("tasks", help=what, description=what)
    few = "of the testbed (default: 2000), or of each of the stock samples (default: 240)"
    p.add_argument("--questions", type=_whole(1), help=few)
    p.add_argument("--out", type=Path, help="an empty or new folder (default: a cache folder)")
    data = "folder of copies of data sets, ROOT/pope/...: tasks that read them, stock otherwise"
    p.add_argument("--data", type=Path, metavar="ROOT", help=data)
    samples = "write scenes in the schemas of public benchmarks there, and tasks that read them"
    p.add_argument("--stock-samples", type=Path, metavar="DIR", help=samples)
    listing = "the real benchmarks: their data, how to run them, and whether it is in the cache"
    p.add_argument("--list", action="store_true", help=listing)
    p.add_argument("--tasks", nargs="+", default=(), metavar="NAME", help="of --data or --list")


def _doctor(commands: Any) -> None:
    p = _command(commands, "doctor", "versions, GPU, kernels and which models can be patched")
    p.add_argument("--model", help="folder or hub id: also say whether it can be patched")


def _sweep(commands: Any) -> None:
    from vtc.evaluation.config import SweepConfig

    defaults = {field.name: field.default for field in dataclasses.fields(SweepConfig)}

    def by_default(name: str) -> str:
        value = defaults[name]
        return f"(default: {' '.join(map(str, value)) if isinstance(value, tuple) else value})"

    p = _command(commands, "sweep", "methods x keep: accuracy against tokens kept, as a report")
    p.add_argument("--config", type=Path, help="YAML file of these options; others here win")
    # what is not given is left out, so that the defaults are written in one place
    p.argument_default = argparse.SUPPRESS
    model = f"folders, hub ids, or models of the testbed {by_default('models')}"
    p.add_argument("--model", dest="models", nargs="+", metavar="MODEL", help=model)
    out = "folder of the results; a second run goes on there"
    p.add_argument("--out", type=Path, help=f"{out} {by_default('out')}")
    methods = f"{_METHOD}; {_COMPOSITION}; the baselines are added {by_default('methods')}"
    p.add_argument("--methods", nargs="+", metavar="METHOD", help=methods)
    keep = f"{_KEEP} {by_default('keeps')}"
    p.add_argument("--keep", dest="keeps", nargs="+", type=_keep, metavar="KEEP", help=keep)
    layers = "shares of decoder layers, for methods that skip work in them (default: of --keep)"
    p.add_argument("--layer-keep", dest="layer_keeps", nargs="+", type=_keep, help=layers)
    p.add_argument(
        "--positions", nargs="+", choices=_POSITIONS, help=f"policies {by_default('positions')}"
    )
    questions = f"questions of each task {by_default('questions')}"
    p.add_argument("--questions", type=_whole(1), help=questions)
    seeds = f"of `random` {by_default('seeds')}"
    p.add_argument("--seeds", nargs="+", type=_whole(0), metavar="SEED", help=seeds)
    tasks = f"lmms-eval tasks {by_default('tasks')}"
    p.add_argument("--tasks", nargs="+", metavar="TASK", help=tasks)
    p.add_argument("--include-path", type=Path, help="folder of lmms-eval task files")
    p.add_argument("--metric", help="the key of a question's score (default: found by itself)")
    p.add_argument("--device", help="cpu, cuda, ... (default: CUDA where there is one)")
    p.add_argument("--dtype", help="default: the checkpoint's on a GPU, float32 on a CPU")
    batch = f"questions per call {by_default('batch_size')}"
    p.add_argument("--batch-size", type=_whole(1), help=batch)
    timed = f"questions that are timed one by one {by_default('timed_samples')}"
    p.add_argument("--timed-samples", type=_whole(0), help=timed)
    pictures = f"pictures in the report {by_default('pictures')}"
    p.add_argument("--pictures", type=_whole(0), help=pictures)
    workers = "processes that answer, on a CPU (default: one for each core, of small models)"
    p.add_argument("--workers", type=_whole(1), help=workers)


def _trace(commands: Any) -> None:
    what = "compute rows of a sweep's table again from its samples, and show where these lie"
    p = _command(commands, "trace", what)
    p.add_argument("out", type=Path, metavar="OUT", help="folder of the sweep")
    p.add_argument("--model", help="short name, as in the table")
    p.add_argument("--task", help="as in the table")
    p.add_argument("--method", help="its name, or with its options as in the table")
    p.add_argument("--keep", help="as in the table: 0.11, 64tok or adaptive")
    p.add_argument("--positions", choices=_POSITIONS)
    p.add_argument("--seed", help="the row of one seed instead of all averaged")
    areas = "rows of the ranking (areas under curves) instead of the table's"
    p.add_argument("--area", action="store_true", help=areas)


def _calibrate(commands: Any) -> None:
    what = "measure which layers, dimensions and heads matter to a model's visual tokens"
    p = _command(commands, "calibrate", what)
    p.add_argument("--model", help="folder, hub id, or a model of the testbed (default: llava)")
    p.add_argument("--task", help="an lmms-eval task to take the questions of")
    p.add_argument("--include-path", type=Path, help="folder of lmms-eval task files")
    p.add_argument("--images", type=Path, help="a folder of pictures instead, with --question")
    p.add_argument("--question", help="what to ask about each picture of --images")
    p.add_argument("--samples", type=_whole(1), default=16, help="(default: %(default)s)")
    parts = ("layers", "sinks", "heads")
    p.add_argument("--what", nargs="+", choices=parts, default=parts, help="(default: all)")
    out = "JSON file to write (default: vtc_calibration_NAME.json)"
    p.add_argument("--out", type=Path, help=out)
    p.add_argument("--plot", type=Path, help="picture to write (default: beside the JSON file)")
    p.add_argument("--device", help="cpu, cuda, ... (default: CUDA where there is one)")
    dtype = "default: the checkpoint's on a GPU, float32 on a CPU"
    p.add_argument("--dtype", default="auto", help=dtype)


def _bench(commands: Any) -> None:
    from vtc.bench.families import SHAPES

    p = _command(commands, "bench", "time kernels and the first token on this machine's GPU")
    what = ("kernels", "ttft")
    p.add_argument("--what", nargs="+", choices=what, default=what, help="(default: both)")
    p.add_argument("--models", nargs="+", choices=tuple(SHAPES), default=("llava-1.5-7b",))
    names = "at 11 %% of the tokens (default: vtc_cls todre flowcut)"
    p.add_argument("--methods", nargs="+", metavar="METHOD", help=names)
    p.add_argument("--runs", type=_whole(1), default=20, help="of each call (default: %(default)s)")
    p.add_argument("--compile", action="store_true", help="torch.compile beside the kernels too")
    p.add_argument("--tiny", action="store_true", help="toy shapes, which run on a CPU as well")
    p.add_argument("--out", type=Path, help="JSONL file to put the rows into")
    p.add_argument("--device", default="auto")


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


def _whole(least: int) -> Callable[[str], int]:
    def parse(text: str) -> int:
        if not text.isdecimal() or int(text) < least:
            raise argparse.ArgumentTypeError(
                f"got {text!r}, expected a whole number of at least {least}"
            )
        return int(text)

    return parse
