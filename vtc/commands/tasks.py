"""`vtc tasks`: task files for lmms-eval, of the testbed and of local copies of real benchmarks."""

from __future__ import annotations

import argparse
import hashlib
import os
import shutil
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from vtc import __version__
from vtc.errors import InputError, OptionError, VtcError

QUESTIONS, SAMPLES = 2000, 240


def run(args: argparse.Namespace) -> int:
    """Print the folder; of real benchmarks, how to run them too."""
    if args.out and (args.list or args.stock_samples):
        raise OptionError("--out goes with --data or alone; --stock-samples names its own folder")
    if args.tasks and not (args.list or args.data):
        raise OptionError("--tasks chooses among benchmarks, expected --list or --data with it")
    if args.questions and (args.list or args.data):
        raise OptionError(
            "--questions says how many are made, expected no --list or --data with it"
        )
    if args.list:
        return _list(args.tasks)
    if args.data:
        return _local(args.data, args.out, args.tasks)
    if args.stock_samples:
        return _stock_samples(args.stock_samples, args.questions or SAMPLES)
    print(tasks_folder(args.questions or QUESTIONS, args.out))
    return 0


def tasks_folder(questions: int, out: Path | None = None) -> Path:
    """The folder of the tasks with `questions` questions, written if it is not there yet.

    Args:
        questions: how many.
        out: a new or empty folder; None: one in the user's cache, which later calls find again.

    Raises:
        InputError: `out` holds something, or is no folder.
        VtcError: the folder cannot be written to.
    """

    def fill(folder: Path) -> None:
        from vtc import testbed

        testbed.write_tasks(folder, questions=questions)

    return _written(out, f"tasks-{__version__}-{questions}-{_digest()}", fill)


def cache_folder() -> Path:
    """`$XDG_CACHE_HOME/vtc`, or `~/.cache/vtc`."""
    base = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(base).expanduser() / "vtc"


def _list(names: Sequence[str]) -> int:
    """Every benchmark with its commands; a folder is looked at, no network."""
    from vtc.evaluation.benchmarks import BENCHMARKS, availability, benchmark, commands

    for of in [benchmark(name) for name in names] or BENCHMARKS.values():
        count = f"{of.questions} questions" if of.questions else "some questions"
        dataset = f"{of.dataset} {of.subset}" if of.subset else of.dataset
        print(f"{of.name}: {dataset}, {of.split}, {count}, {availability(of)}")
        print(f"  scored by {', '.join(of.metrics)}" + (f"; {of.note}" if of.note else ""))
        for command in commands(of.name):
            print(f"  {command}")
    return 0


def _local(root: Path, out: Path | None, names: Sequence[str]) -> int:
    """Task files of the copies under a folder."""
    from vtc.evaluation.local_tasks import find_copies, task_files

    copies, notes = find_copies(root.expanduser().absolute(), names)
    files = task_files(copies)
    digest = hashlib.sha256(repr(sorted(files.items())).encode()).hexdigest()[:8]
    folder = _written(out, f"local-{digest}", lambda new: _put(files, new))
    counts = {copy.benchmark.name: copy.questions.rows for copy in copies}
    _show(folder, counts)
    print(*notes, sep="\n", end="\n" if notes else "")
    return 0


def _stock_samples(out: Path, questions: int) -> int:
    """Samples in the schemas of benchmarks, and task files with the prompts that models know."""
    from vtc.evaluation.local_tasks import find_copies, task_files
    from vtc.testbed import model_folder
    from vtc.testbed.stock_samples import PROMPTS, require_pairs, write_stock_samples

    require_pairs(questions)
    _require_new(out)
    out = out.absolute()
    names: list[str] = []
    data = _written(out / "data", "", lambda new: names.extend(write_stock_samples(new, questions)))
    copies, _ = find_copies(data, names)
    files = task_files(copies, dict.fromkeys(names, PROMPTS))
    folder = _written(out / "tasks", "", lambda new: _put(files, new))
    counts = {copy.benchmark.name: copy.questions.rows for copy in copies}
    _show(folder, counts, str(model_folder()))
    return 0


def _put(files: Mapping[str, str], folder: Path) -> None:
    for name, content in files.items():
        (folder / name).write_text(content, encoding="utf-8")


def _show(folder: Path, counts: Mapping[str, int], model: str = "MODEL") -> None:
    from vtc.evaluation.benchmarks import commands
    from vtc.evaluation.local_tasks import GROUP

    print(folder)
    for name, count in counts.items():
        print(f"{name}: {count} questions")
    print(*commands(" ".join(counts), folder, GROUP, model), sep="\n")


def _written(out: Path | None, name: str, fill: Callable[[Path], object]) -> Path:
    """A folder filled by `fill`: `out`, or one of that name in the cache that may be there."""
    folder = (cache_folder() / name if out is None else out).absolute()
    if out is None and folder.is_dir():
        return folder
    if out is not None:
        _require_new(out)
    try:
        return _whole(folder, fill)
    except OSError as error:
        raise VtcError(
            f"cannot write the tasks to {str(folder)!r} ({error.strerror}), expected a writable "
            f"place: give one with --out, or set XDG_CACHE_HOME"
        ) from None


def _require_new(out: Path) -> None:
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise InputError(
            f"{str(out)!r} exists and is not an empty folder, expected a new one: name "
            f"another place"
        )


def _whole(folder: Path, fill: Callable[[Path], object]) -> Path:
    """Written under another name first, so that a folder of that name is always whole."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=".vtc-", dir=folder.parent))
    try:
        fill(temporary)
        temporary.chmod(0o755)
        temporary.replace(folder)
    except FileExistsError:
        # another process was faster
        pass
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return folder


def _digest() -> str:
    """Names the testbed's code and data: a changed one is never taken for the cached one."""
    from vtc import testbed

    digest = hashlib.sha256()
    root = Path(testbed.__file__).parent
    for part in sorted(root.rglob("*")):
        if part.suffix in (".py", ".npz", ".jpg", ".yaml"):
            digest.update(part.relative_to(root).as_posix().encode() + part.read_bytes())
    return digest.hexdigest()[:8]
