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
from vtc.scorers import RandomScores
from vtc.types import Budget

FULL, RANDOM = "none", "random"
_CLOSING = {"(": ")", "[": "]", "{": "}"}
# values with one of these would be read as something else
_MARKS = frozenset("\"'([{}]),+@ ")


@dataclass(frozen=True)
class Compression:
    """The arguments of `vtc.patch`, checked before any model is loaded.

    Args:
        method: a registered name, or a composition as `parse_method` reads it.
        keep: a fraction in (0, 1], tokens per image, or their text (`"0.11"`, `"64tok"`); a bare 1
            is refused. None for methods that decide by themselves, and for `none`.
        positions: `"keep"`, `"renumber"`, `"median"` or `"published"`.
        seed: for methods that draw.
        options: options of the method; lists, as JSON and YAML have them, stand for tuples.

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
        given = {key: tuple(v) if isinstance(v, list) else v for key, v in self.options.items()}
        object.__setattr__(self, "options", given)
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
        return build(self.method, self.options)

    def patch(self, model: Any) -> Any:
        """`vtc.patch(model)` with these arguments; a handle to be used as a context manager."""
        keep = cast("float | int | None", self.keep)
        positions = cast("Positions", self.positions)
        return vtc.patch(model, self.build(), keep, positions=positions, seed=self.seed)

    @property
    def label(self) -> str:
        """The method as it is written in tables: `vtc_cls`, or `vtc_cls:start=8` with options."""
        return label(self.method, self.options)


def build(method: str, options: Mapping[str, Any]) -> Method:
    """A method by its name and options, or a composition by its text.

    Raises:
        OptionError: no such method or option, or options beside a composition.
    """
    if not _is_composition(method):
        return vtc.method(method, **options)
    if options:
        raise OptionError(
            f"options {sorted(options)} were given beside the composition {method!r}; write them "
            "into its stages: name:option=value@keep"
        )
    return vtc.compose(*(_stage(text) for text in _split(method, "+")))


def label(method: str, options: Mapping[str, Any]) -> str:
    """A method and its options in the words that `parse_method` reads."""
    words = ",".join(f"{key}={_word(value)}" for key, value in sorted(options.items()))
    return f"{method}:{words}" if words else method


def controls(method: str, options: Mapping[str, Any]) -> tuple[str, ...]:
    """Labels of runs that choose at random what this one chooses; the first that was run counts.

    For tokens to a budget that is the baseline `random`; for layers, and where the method decides
    how many tokens go, it is the method itself with `scorer=random`, at the same keep.
    """
    built = build(method, options)
    if built.count != "adaptive" and built.site != "llm_rows":
        return (RANDOM,)
    at_random = {**options, "scorer": RANDOM}
    return label(method, at_random), label(method, at_random | {"selector": "top_k"})


def stages(method: Method) -> tuple[Method, ...]:
    """The method alone, or those of a composition."""
    return tuple(step.method for step in method.steps(Budget(None)))


def draws(method: Method) -> bool:
    """Whether the seed matters to it: some part of it chooses at random."""
    return any(m.name == RANDOM or isinstance(m.scorer, RandomScores) for m in stages(method))


def parse_method(text: str) -> tuple[str, dict[str, Any]]:
    """`"vtc_cls"` or `"vtc_cls:start=8,ensemble=max"` as a name and options.

    Values are Python's (`layers=(0,2)`, `interval=None`) or plain words; commas and signs inside
    brackets and quotes are theirs. `"flowcut@0.5+todre:objective=k_center@0.1+var"` is a
    composition, each stage with its keep behind an @: its text is its name, and it has no options.

    Raises:
        OptionError: the method or an option does not exist, an option has no value, or the stages
            of a composition do not go together.
    """
    text = text.strip()
    if _is_composition(text):
        build(text, {})
        return text, {}
    name, options = _parsed(text)
    vtc.method(name, **options)
    return name, options


def _is_composition(text: str) -> bool:
    return any(len(_split(text, mark)) > 1 for mark in "+@")


def _stage(text: str) -> tuple[str, float | int | None, dict[str, Any]]:
    """`"todre:objective=k_center@0.1"`: a name, its keep and options."""
    written, *keeps = _split(text.strip(), "@")
    if len(keeps) > 1:
        raise OptionError(f"stage {text!r} has {len(keeps)} keeps, expected at most one: name@keep")
    name, options = _parsed(written)
    return name, parse_keep(keeps[0]) if keeps else None, options


def _parsed(text: str) -> tuple[str, dict[str, Any]]:
    name, _, written = text.partition(":")
    options: dict[str, Any] = {}
    for part in filter(None, _split(written, ",")):
        key, equals, value = part.partition("=")
        if not equals:
            raise OptionError(f"method {text!r}: got {part!r}, expected option=value")
        options[key.strip()] = _value(value.strip())
    return name, options


def _split(text: str, separator: str) -> list[str]:
    """`text` at the separators that stand outside brackets and quotes."""
    parts, open_until, quote = [""], list[str](), ""
    for character in text:
        if quote:
            quote = "" if character == quote else quote
        elif character in "\"'":
            quote = character
        elif character in _CLOSING:
            open_until.append(_CLOSING[character])
        elif open_until and character == open_until[-1]:
            open_until.pop()
        elif character == separator and not open_until:
            parts.append("")
            continue
        parts[-1] += character
    return parts


def _value(text: str) -> Any:
    try:
        return ast.literal_eval(text)
    except (SyntaxError, ValueError):
        return text


def _word(value: Any) -> str:
    """A value as `_value` reads it back: quotes only where a plain word would mean another one."""
    if isinstance(value, str) and value == _value(value) and not _MARKS & set(value):
        return value
    # no blanks: a label is one word
    return repr(value).replace(", ", ",") if isinstance(value, tuple) else repr(value)
