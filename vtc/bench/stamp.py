"""What a row says about the machine and the code that made it."""

from __future__ import annotations

import datetime
import platform
import subprocess
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
import transformers


def commit() -> str | None:
    """The commit of the checkout that this code is from; None without git, or where it is
    installed."""
    here = Path(__file__)
    git = ["git", "-C", str(here.parent)]
    try:
        # an installed copy may lie in the checkout of another project
        ours = subprocess.run(
            [*git, "ls-files", "--error-unmatch", here.name], capture_output=True, check=False
        )
        found = subprocess.run(
            [*git, "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False
        )
    except OSError:
        return None
    return found.stdout.strip() or None if ours.returncode == 0 else None


def machine(device: str) -> str:
    """What did the work: the GPU's name, else the processor's."""
    if device.startswith("cuda"):
        return torch.cuda.get_device_name(device)
    return platform.processor() or platform.machine()


def stamp(device: str, sha: str | None) -> dict[str, Any]:
    """Machine, versions, date and commit."""
    try:
        triton = metadata.version("triton")
    except metadata.PackageNotFoundError:
        triton = None
    cuda = device.startswith("cuda")
    return {
        "gpu": machine(device) if cuda else None,
        "cpu": platform.processor() or platform.machine(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda if cuda else None,
        "transformers": transformers.__version__,
        "triton": triton,
        "python": platform.python_version(),
        "date": datetime.date.today().isoformat(),
        "commit": sha,
    }
