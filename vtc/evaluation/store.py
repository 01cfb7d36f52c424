"""Finished cells on disk: one JSONL of samples and one JSON each, written whole or not at all."""

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

# what a sweep writes is below 10 MB; a fuller disk would stop it in the middle
_FREE_BYTES = 64 * 2**20


def check_writable(folder: Path) -> None:
    """See that `folder`, or the nearest folder above it that exists, takes files; leaves nothing.

    Raises:
        VtcError: it is a file, cannot be made or written, or its disk is full.
    """
    whole = folder.absolute()
    existing = next(path for path in (whole, *whole.parents) if path.exists())
    try:
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
        raise VtcError(f"{path} could not be written ({error.strerror or error})") from error
    finally:
        with contextlib.suppress(OSError):
            partial.unlink(missing_ok=True)


def to_json(value: Any) -> str:
    """JSON for a person to read."""
    return json.dumps(value, indent=1, ensure_ascii=False) + "\n"


class Cells:
    """The finished cells below a folder, each under the name of its settings.

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
            data = self._path(settings, ".samples.jsonl").read_bytes()
        except (OSError, ValueError):
            return None
        expected = self._head(settings, data)
        if not isinstance(cell, dict) or {key: cell.get(key) for key in expected} != expected:
            return None
        return {**cell, "samples": [json.loads(line) for line in data.splitlines()]}

    def save(
        self,
        settings: Mapping[str, Any],
        summary: Mapping[str, Any],
        samples: Iterable[Mapping[str, Any]],
    ) -> None:
        """Write a cell; its JSON comes last and makes it count."""
        data = "".join(f"{json.dumps(sample)}\n" for sample in samples).encode()
        write(self._path(settings, ".samples.jsonl"), data)
        write(self._path(settings, ".json"), to_json({**self._head(settings, data), **summary}))

    def _head(self, settings: Mapping[str, Any], samples: bytes) -> dict[str, Any]:
        """What a cell's JSON must say for the samples beside it to be believed."""
        return {
            "settings": _plain(settings),
            "fingerprint": self.fingerprint,
            "n_samples": samples.count(b"\n"),
            # the two files are replaced one after the other: a stop in between leaves a pair that
            # doesn't belong together
            "samples_sha256": hashlib.sha256(samples).hexdigest(),
        }

    def _path(self, settings: Mapping[str, Any], ending: str) -> Path:
        digest = hashlib.sha256(json.dumps(_plain(settings), sort_keys=True).encode()).hexdigest()
        shown = ("method", "positions", "keep", "seed")
        name = "-".join(str(settings[key]).replace("/", "_") for key in shown)
        return self.folder / f"{name}-{digest[:8]}{ending}"


def _plain(settings: Mapping[str, Any]) -> Any:
    """As JSON gives it back."""
    return json.loads(json.dumps(settings))
