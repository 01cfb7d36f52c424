"""CPU threads within what the process may really use; more than that slow torch down manyfold."""

from __future__ import annotations

import contextlib
import math
import os
from collections.abc import Iterator
from pathlib import Path

import torch

_CGROUP = Path("/sys/fs/cgroup")


@contextlib.contextmanager
def within_quota() -> Iterator[None]:
    """Lower torch's number of threads to the container's CPU quota, and set it back.

    torch counts the machine's cores; a container with `--cpus 2` on a machine of 64 has 64 of them,
    and threads that wait for each other while the quota holds half of them back.
    """
    before = torch.get_num_threads()
    quota = cpu_quota()
    if quota is not None and quota < before:
        torch.set_num_threads(quota)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def cores() -> int:
    """CPUs that this process may use, at least 1."""
    own = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, min(own, cpu_quota() or own))


def cpu_quota(root: Path = _CGROUP) -> int | None:
    """CPUs that the process's control group may use, at least 1; None where nothing limits them."""
    try:
        if (file := root / "cpu.max").is_file():
            limit, period = file.read_text().split()
        else:
            limit = (root / "cpu" / "cpu.cfs_quota_us").read_text().strip()
            period = (root / "cpu" / "cpu.cfs_period_us").read_text().strip()
        return None if limit in ("max", "-1") else max(1, math.floor(int(limit) / int(period)))
    except (OSError, ValueError):
        return None
