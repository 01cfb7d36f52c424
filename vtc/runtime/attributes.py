"""Attributes of one object, put in for a while."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


@contextmanager
def replaced(of: object, name: str, value: Any) -> Iterator[None]:
    """Within it, `of` has its own attribute `name`; behind it, what it had of its own before."""
    own = vars(of)
    had, before = name in own, own.get(name)
    own[name] = value
    try:
        yield
    finally:
        if had:
            own[name] = before
        else:
            del own[name]
