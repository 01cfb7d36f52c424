"""Checks of numbers on a device: at once, or once nothing has to wait for the answer."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

import torch
from torch import Tensor

from vtc.errors import VtcError

_later: ContextVar[Deferred | None] = ContextVar("vtc_checks", default=None)


class Deferred:
    """Checks whose answers nobody has read yet."""

    def __init__(self) -> None:
        self._found: list[tuple[Tensor, str]] = []

    def add(self, bad: Tensor, message: str) -> None:
        """Remember `bad`, a truth value on its device."""
        self._found.append((bad, message))

    @property
    def flags(self) -> list[Tensor]:
        """The truth values."""
        return [bad for bad, _ in self._found]

    @property
    def messages(self) -> list[str]:
        """What each would say."""
        return [message for _, message in self._found]

    def settle(self) -> None:
        """Read all of them; raises the first `VtcError`."""
        found, self._found = self._found, []
        for device in {bad.device for bad, _ in found}:
            here = [(bad, message) for bad, message in found if bad.device == device]
            for is_bad, (_, message) in zip(
                torch.stack([bad for bad, _ in here]).tolist(), here, strict=True
            ):
                if is_bad:
                    raise VtcError(message)


@contextmanager
def deferred(later: Deferred) -> Iterator[None]:
    """Within it, `require_none` leaves its answers to `later`."""
    before = _later.set(later)
    try:
        yield
    finally:
        _later.reset(before)


def require_none(bad: Tensor, message: str) -> None:
    """Raise `VtcError` if any of `bad` is true."""
    found = bad.any()
    if (later := _later.get()) is not None:
        later.add(found, message)
    elif bool(found):
        raise VtcError(message)
