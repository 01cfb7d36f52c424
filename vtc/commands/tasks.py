"""`vtc tasks`: the testbed as lmms-eval tasks, written once and reused."""

from __future__ import annotations

import argparse
import hashlib
import os
import shutil
import tempfile
from pathlib import Path

from vtc import __version__
from vtc.errors import InputError, VtcError


def run(args: argparse.Namespace) -> int:
    """Print the folder."""
    print(tasks_folder(args.questions, args.out))
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
    folder = cache_folder() / f"tasks-{__version__}-{questions}-{_digest()}" if out is None else out
    if out is None and folder.is_dir():
        return folder
    if out is not None and out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise InputError(
            f"{str(out)!r} exists and is not an empty folder, expected a new one: name "
            f"another place"
        )
    try:
        return _write(folder.absolute(), questions)
    except OSError as error:
        raise VtcError(
            f"cannot write the tasks to {str(folder)!r} ({error.strerror}), expected a writable "
            f"place: give one with --out, or set XDG_CACHE_HOME"
        ) from None


def cache_folder() -> Path:
    """`$XDG_CACHE_HOME/vtc`, or `~/.cache/vtc`."""
    base = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(base).expanduser() / "vtc"


def _write(folder: Path, questions: int) -> Path:
    """Written under another name first, so that a folder of that name is always whole."""
    from vtc import testbed

    folder.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=".vtc-", dir=folder.parent))
    try:
        testbed.write_tasks(temporary, questions=questions)
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
