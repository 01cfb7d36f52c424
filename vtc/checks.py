"""Checks of numbers on a device: at once, or once nothing has to wait for the answer."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

import torch
from torch import Tensor

from vtc.errors import VtcError

# what is said, as a `VtcError` unless it is an error already
Problem = str | VtcError

_later: ContextVar[Deferred | None] = ContextVar("vtc_checks", default=None)


class Deferred:
    """Checks whose answers nobody has read yet."""

    def __init__(self) -> None:
        self._found: list[tuple[Tensor, Problem]] = []

    def add(self, bad: Tensor, problem: Problem) -> None:
        """Remember `bad`, a truth value on its device."""
        self._found.append((bad, problem))

    @property
    def flags(self) -> list[Tensor]:
        """The truth values."""
        return [bad for bad, _ in self._found]

    @property
    def messages(self) -> list[Problem]:
        """What each would say."""
        return [problem for _, problem in self._found]

    def settle(self) -> None:
        """Read all of them; raises the first `VtcError`."""
        found, self._found = self._found, []
        for device in {bad.device for bad, _ in found}:
            here = [(bad, problem) for bad, problem in found if bad.device == device]
            for is_bad, (_, problem) in zip(
                torch.stack([bad for bad, _ in here]).tolist(), here, strict=True
            ):
                if is_bad:
                    raise _error(problem)


@contextmanager
def deferred(later: Deferred) -> Iterator[None]:
    """Within it, `require_none` leaves its answers to `later`."""
    before = _later.set(later)
    try:
        yield
    finally:
        _later.reset(before)


def require_none(bad: Tensor, problem: Problem) -> None:
    """Raise `VtcError`, or the error given, if any of `bad` is true."""
    found = bad.any()
    if (later := _later.get()) is not None:
        later.add(found, problem)
    elif bool(found):
        raise _error(problem)


def _error(problem: Problem) -> VtcError:
    return problem if isinstance(problem, VtcError) else VtcError(problem)
