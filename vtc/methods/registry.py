"""Every method file in this folder, found by itself: adding a method is adding a file."""

from __future__ import annotations

import dataclasses
import importlib
import pkgutil
from functools import cache
from pathlib import Path
from typing import Any

from vtc.errors import OptionError
from vtc.methods.base import Method

_REGISTERED: dict[str, type[Method]] = {}


def register(cls: type[Method]) -> type[Method]:
    """Make a method of your own known by its name (a decorator). Not needed to pass an object to
    `vtc.patch`. The same class defined once more, as when a notebook's cell runs again, takes the
    place of the one before.

    Raises:
        OptionError: not a method class, or another one has that name.
    """
    if not (isinstance(cls, type) and issubclass(cls, Method)):
        raise OptionError(f"register got {cls!r}, expected a class derived from vtc.Method")
    known = _table().get(cls.name, cls)
    same = (known.__module__, known.__qualname__) == (cls.__module__, cls.__qualname__)
    if not same or _built_in().get(cls.name, cls) is not cls:
        raise OptionError(f"a method called {cls.name!r} exists already; give yours another name")
    _REGISTERED[cls.name] = cls
    return cls


@cache
def _built_in() -> dict[str, type[Method]]:
    found: dict[str, type[Method]] = {}
    for module in pkgutil.iter_modules([str(Path(__file__).parent)]):
        members = vars(importlib.import_module(f"vtc.methods.{module.name}")).values()
        for member in members:
            if isinstance(member, type) and issubclass(member, Method) and "name" in vars(member):
                found[member.name] = member
    return dict(sorted(found.items()))


def _table() -> dict[str, type[Method]]:
    return {**_built_in(), **_REGISTERED}


def methods() -> dict[str, str]:
    """Names of all registered methods, with one line each."""
    return {name: cls.summary for name, cls in _table().items()}


def method(name: str | Method, **options: Any) -> Method:
    """Build a method with options.

    Raises:
        OptionError: the name or an option is unknown, an option has the wrong type, or options are
            given beside a method object.
    """
    if isinstance(name, Method):
        if options:
            raise OptionError(
                f"options {sorted(options)} were given beside a method object {name!r}; put them "
                "into the object, or pass its name"
            )
        return name
    table = _table()
    if isinstance(name, type) and issubclass(name, Method):
        raise OptionError(
            f"method is the class {name.__name__}, expected a vtc.Method object or a name: "
            f"pass {name.__name__}()"
        )
    if not isinstance(name, str) or name not in table:
        raise OptionError(
            f"method {name!r} is unknown; expected one of {', '.join(table)}, or a vtc.Method "
            f"object"
        )
    cls = table[name]
    known = [option.name for option in dataclasses.fields(cls)]
    if unknown := sorted(set(options) - set(known)):
        raise OptionError(
            f"method {name!r} has no option {unknown[0]!r}; it has {', '.join(known)}"
        )
    return cls(**options)
