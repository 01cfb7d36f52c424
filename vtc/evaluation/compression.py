"""What one run does to the model: a method with its options, keep, positions and the seed."""

from __future__ import annotations

import ast
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, cast, get_args

import vtc
from vtc.errors import OptionError
from vtc.keep import parse_keep
from vtc.methods.base import Method, Positions


@dataclass(frozen=True)
class Compression:
    """The arguments of `vtc.patch`, checked before any model is loaded.

    Args:
        method: a registered name.
        keep: a fraction in (0, 1], tokens per image, or their text (`"0.11"`, `"64tok"`); a bare 1
            is refused. None for methods that decide by themselves, and for `none`.
        positions: `"keep"`, `"renumber"`, `"median"` or `"published"`.
        seed: for methods that draw.
        options: options of the method.

    Raises:
        OptionError: any of them is not one that exists.
    """

    method: str
    keep: float | int | str | None = None
    positions: str = "keep"
    seed: int = 0
    options: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        keep = None if self.keep is None else parse_keep(self.keep)
        object.__setattr__(self, "options", dict(self.options))
        if self.positions not in get_args(Positions):
            expected = ", ".join(get_args(Positions))
            raise OptionError(
                f"positions={self.positions!r} is unknown; expected one of {expected}"
            )
        if isinstance(self.seed, bool) or not isinstance(self.seed, int):
            raise OptionError(
                f"seed={self.seed!r} is a {type(self.seed).__name__}; expected an int"
            )
        object.__setattr__(self, "keep", self.build().check_keep(keep).keep)

    def build(self) -> Method:
        """The method with its options."""
        return vtc.method(self.method, **self.options)

    def patch(self, model: Any) -> Any:
        """`vtc.patch(model)` with these arguments; a handle to be used as a context manager."""
        keep = cast("float | int | None", self.keep)
        positions = cast("Positions", self.positions)
        return vtc.patch(model, self.build(), keep, positions=positions, seed=self.seed)

    @property
    def label(self) -> str:
        """The method as it is written in tables: `vtc_cls`, or `vtc_cls:start=8` with options."""
        options = ",".join(f"{key}={value}" for key, value in sorted(self.options.items()))
        return f"{self.method}:{options}" if options else self.method


def parse_method(text: str) -> tuple[str, dict[str, Any]]:
    """`"vtc_cls"` or `"vtc_cls:start=8,ensemble=max"` as a name and options.

    Raises:
        OptionError: the method or an option does not exist, or an option has no value.
    """
    name, _, written = text.partition(":")
    options: dict[str, Any] = {}
    for part in filter(None, written.split(",")):
        key, equals, value = part.partition("=")
        if not equals:
            raise OptionError(f"method {text!r}: got {part!r}, expected option=value")
        try:
            options[key] = ast.literal_eval(value)
        except (SyntaxError, ValueError):
            options[key] = value
    vtc.method(name, **options)
    return name, options
