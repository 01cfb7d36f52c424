"""Finished cells on disk: samples, masks of what was kept, and a JSON that vouches for both.

Each file is written whole or not at all, the JSON last.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from vtc.errors import VtcError

# a sweep writes some 100 kB per cell; a fuller disk would stop it in the middle
_FREE_BYTES = 64 * 2**20
_SAMPLES, _KEPT = ".samples.jsonl", ".kept.npz"


def check_writable(folder: Path) -> None:
    """See that `folder`, or the nearest folder above it that exists, takes files; leaves nothing.

    Raises:
        VtcError: it is a file, cannot be made or written, or its disk is full.
    """
    whole = folder.absolute()
    try:
        existing = next(path for path in (whole, *whole.parents) if path.exists())
        with tempfile.TemporaryFile(dir=existing) as file:
            file.write(b"\0" * 4096)
            file.flush()
            os.fsync(file.fileno())
        free = shutil.disk_usage(existing).free
    except OSError as error:
        raise VtcError(
            f"out={str(folder)!r} cannot be written ({error.strerror or error}), expected a folder "
            f"for results; pass another one"
        ) from None
    if free < _FREE_BYTES:
        raise VtcError(
            f"out={str(folder)!r} has {free // 2**20} MB free, expected at least "
            f"{_FREE_BYTES // 2**20} MB; pass another one or make room"
        )


def write(path: Path, content: str | bytes) -> None:
    """Write a file whole or not at all, whenever the process or the machine stops.

    Raises:
        VtcError: the disk is full or the folder went away; nothing of the file is left then.
    """
    data = content.encode() if isinstance(content, str) else content
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with partial.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    except OSError as error:
        raise VtcError(
            f"{path} could not be written ({error.strerror or error}), expected room for it; what "
            f"is finished is kept: make room and run the same again"
        ) from error
    finally:
        with contextlib.suppress(OSError):
            partial.unlink(missing_ok=True)


def to_json(value: Any) -> str:
    """JSON for a person to read."""
    return json.dumps(value, indent=1, ensure_ascii=False) + "\n"


def remove_leftovers(folder: Path) -> None:
    """Remove what processes that are gone left half-written below a folder."""
    for partial in folder.glob(".*.partial"):
        owner = partial.name.split(".")[-2]
        if not (owner.isdecimal() and _runs(int(owner))):
            with contextlib.suppress(OSError):
                partial.unlink()


def _runs(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except OSError:
        pass
    return True


class Cells:
    """The finished cells in a folder, each under the name of its settings.

    Args:
        folder: where they are.
        fingerprint: of everything beside the settings that an answer depends on; a cell that was
            made under another one counts as not there.
    """

    def __init__(self, folder: Path, fingerprint: Mapping[str, Any]) -> None:
        self.folder = folder
        self.fingerprint = dict(fingerprint)

    def load(self, settings: Mapping[str, Any]) -> dict[str, Any] | None:
        """The summary of a finished cell, with its `samples`; None if it has to be run."""
        try:
            cell = json.loads(self._path(settings, ".json").read_bytes())
            files = self._files(settings)
        except (OSError, ValueError):
            return None
        expected = self._head(settings, files)
        if not isinstance(cell, dict) or {key: cell.get(key) for key in expected} != expected:
            return None
        return {**cell, "samples": [json.loads(line) for line in files[_SAMPLES].splitlines()]}

    def save(
        self,
        settings: Mapping[str, Any],
        summary: Mapping[str, Any],
        samples: Iterable[Mapping[str, Any]],
        kept: bytes = b"",
    ) -> None:
        """Write a cell; its JSON comes last and makes it count.

        Args:
            settings: what names it.
            summary: what else its JSON holds.
            samples: the lines of its samples file.
            kept: the content of its masks' file; nothing: it has none.
        """
        lines = "".join(f"{json.dumps(sample)}\n" for sample in samples)
        files = {_SAMPLES: lines.encode(), _KEPT: kept}
        for ending, data in files.items():
            if data or ending == _SAMPLES:
                write(self._path(settings, ending), data)
        write(self._path(settings, ".json"), to_json({**self._head(settings, files), **summary}))

    def name(self, settings: Mapping[str, Any]) -> str:
        """What the files of a cell are called, without their endings."""
        digest = hashlib.sha256(json.dumps(_plain(settings), sort_keys=True).encode()).hexdigest()
        shown = ("model", "task", "method", "positions", "keep", "seed")
        parts = [str(settings[key]).replace("/", "_") for key in shown if key in settings]
        # a composition with options can be longer than a file's name may be
        return f"{'-'.join(parts)[:120]}-{digest[:8]}"

    def _files(self, settings: Mapping[str, Any]) -> dict[str, bytes]:
        masks = self._path(settings, _KEPT)
        return {
            _SAMPLES: self._path(settings, _SAMPLES).read_bytes(),
            _KEPT: masks.read_bytes() if masks.exists() else b"",
        }

    def _head(self, settings: Mapping[str, Any], files: Mapping[str, bytes]) -> dict[str, Any]:
        """What a cell's JSON must say for the files beside it to be believed."""
        return {
            "settings": _plain(settings),
            "fingerprint": self.fingerprint,
            "n_samples": files[_SAMPLES].count(b"\n"),
            # the files are replaced one after the other: a stop in between leaves some that don't
            # belong together
            "samples_sha256": hashlib.sha256(files[_SAMPLES]).hexdigest(),
            "kept_sha256": hashlib.sha256(files[_KEPT]).hexdigest(),
        }

    def _path(self, settings: Mapping[str, Any], ending: str) -> Path:
        return self.folder / f"{self.name(settings)}{ending}"


def _plain(settings: Mapping[str, Any]) -> Any:
    """As JSON gives it back."""
    return json.loads(json.dumps(settings))
