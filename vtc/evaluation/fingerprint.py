"""What an answer depends on beside a cell's settings, and what a report says about the machine."""

from __future__ import annotations

import hashlib
import importlib
import importlib.metadata
import platform
import subprocess
from collections.abc import Iterable
from pathlib import Path

import torch

import vtc
from vtc.evaluation.loading import Loaded

_PACKAGES = ("torch", "transformers", "lmms-eval", "datasets", "numpy", "scipy")
# parts of the package that no answer, score or count comes from, with these files as exceptions;
# the testbed's pictures and questions are seen as files
_SHOWN_ONLY = ("cli.py", "viz.py", "layer_chart.py", "commands", "evaluation", "testbed")
_MEASURING = (
    "evaluation/compression.py",
    "evaluation/evaluate.py",
    "evaluation/flops.py",
    "evaluation/kept.py",
    "evaluation/loading.py",
    "evaluation/measure.py",
    "evaluation/model.py",
    "evaluation/timing.py",
    "evaluation/visuals.py",
    "testbed/examples.py",
    "testbed/scoring.py",
)
_READ_WHOLE = 64 * 2**20


def fingerprint(loaded: Loaded, data: Path | None) -> dict[str, str]:
    """Names the code, the model and the questions: where one differs, an old cell is run again."""
    return {
        "vtc": f"{vtc.__version__}+{_code()}",
        "torch": torch.__version__,
        "transformers": importlib.metadata.version("transformers"),
        "lmms-eval": importlib.metadata.version("lmms-eval"),
        "model": _model(loaded),
        "dtype": str(loaded.model.dtype),
        "device": loaded.model.device.type,
        "questions": _hash(_task_files(data), data) if data else "by name",
    }


def environment() -> dict[str, str]:
    """Versions and the machine, for the report."""
    found = {"vtc": vtc.__version__, "python": platform.python_version()}
    found |= {name: importlib.metadata.version(name) for name in _PACKAGES}
    found["system"] = platform.platform(terse=True)
    found["cpu"] = _cpu()
    found["threads"] = str(torch.get_num_threads())
    if torch.cuda.is_available():
        found["gpu"] = torch.cuda.get_device_name()
    if commit := _commit():
        found["commit"] = commit
    return found


def _code() -> str:
    root = Path(vtc.__file__).parent
    packages = [root, *(Path(p) for name in ("adapters", "kernels") for p in _paths(f"vtc.{name}"))]
    files = [
        file
        for package in packages
        for file in sorted(package.rglob("*.py"))
        if package != root or file.relative_to(root).parts[0] not in _SHOWN_ONLY
    ]
    return _hash([*files, *(root / name for name in _MEASURING)])


def _task_files(folder: Path) -> list[Path]:
    """Task files, scoring functions and questions; not what Python compiles beside them."""
    return sorted(
        path for path in folder.rglob("*") if path.is_file() and path.parent.name != "__pycache__"
    )


def _paths(package: str) -> list[str]:
    return list(importlib.import_module(package).__path__)


def _model(loaded: Loaded) -> str:
    if commit := getattr(loaded.model.config, "_commit_hash", None):
        return str(commit)
    folder = Path(loaded.pretrained).expanduser()
    return _hash(sorted(file for file in folder.iterdir() if file.is_file()), folder)


def _hash(files: Iterable[Path], root: Path | None = None) -> str:
    digest = hashlib.sha256()
    for file in files:
        stat = file.stat()
        digest.update(f"{file.relative_to(root) if root else file.name} {stat.st_size}".encode())
        if stat.st_size <= _READ_WHOLE:
            digest.update(file.read_bytes())
        else:
            # large weights: reading them costs more than a false repetition
            digest.update(str(stat.st_mtime_ns).encode())
    return digest.hexdigest()[:16]


def _cpu() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def _commit() -> str | None:
    command = ["git", "-C", str(Path(vtc.__file__).parent), "rev-parse", "--short=12", "HEAD"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None
