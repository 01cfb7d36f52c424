"""Calibrations as JSON: one line per field, infinity as null, checked when read."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from vtc.errors import InputError


def plain(fields: Mapping[str, Any]) -> dict[str, Any]:
    """The same with tuples as lists and infinity as None."""
    return {name: _plain(value) for name, value in fields.items()}


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return plain(value)
    if isinstance(value, tuple | list):
        return [_plain(v) for v in value]
    return None if value == math.inf else value


def text(fields: Mapping[str, Any], indent: str = "") -> str:
    """The text of a file that holds plain fields; an object inside is written like the whole."""
    lines = []
    for name, value in fields.items():
        if isinstance(value, Mapping):
            written = text(value, indent + "  ").rstrip()
        else:
            written = json.dumps(value, allow_nan=False, ensure_ascii=False)
        lines.append(f"{indent}  {json.dumps(name)}: {written}")
    return "{\n" + ",\n".join(lines) + f"\n{indent}}}\n"


def read(path: Path) -> dict[str, Any]:
    """The fields of the calibration in a file.

    Raises:
        InputError: no such file, or one that holds something else.
    """
    fix = "name a file that vtc calibrate wrote"
    if not path.is_file():
        kind = "a folder" if path.is_dir() else "not there"
        raise InputError(f"calibration {str(path)!r} is {kind}, expected a JSON file: {fix}")
    try:
        given = json.loads(path.read_text(encoding="utf-8"))
        return _fields(given, _READERS)
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise InputError(f"calibration {str(path)!r} is not JSON ({error}): {fix}") from None
    except ValueError as error:
        raise InputError(f"calibration {str(path)!r} is not one: {error}; {fix}") from None


def _fields(given: Any, readers: Mapping[str, Callable[[Any], Any]]) -> dict[str, Any]:
    if not isinstance(given, dict):
        raise ValueError(f"it holds a {type(given).__name__}, expected an object")
    if unknown := sorted(set(given) - set(readers)):
        raise ValueError(f"key {unknown[0]!r} is unknown, expected {', '.join(readers)}")
    found: dict[str, Any] = {}
    for name, value in given.items():
        try:
            found[name] = readers[name](value)
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from None
    _check_lengths(found)
    return found


def _check_lengths(found: Mapping[str, Any]) -> None:
    """All that is per layer has one entry for each of the same layers."""
    per_layer = {k: len(v) for k, v in found.items() if k in _PER_LAYER}
    if len(set(per_layer.values())) > 1:
        counts = ", ".join(f"{name} has {n}" for name, n in per_layer.items())
        raise ValueError(f"{counts} layers, expected the same number")
    rows = {len(row) for row in found.get("head_ratio", ())}
    if len(rows) > 1:
        raise ValueError(f"head_ratio has rows of {sorted(rows)} heads, expected the same number")


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise ValueError(f"got {value!r}, expected text")
    return value


def _whole(value: Any) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or value < 0:
        raise ValueError(f"got {value!r}, expected a whole number of at least 0")
    return value


def _number(value: Any) -> float:
    if value is None:
        return math.inf
    if isinstance(value, bool) or not isinstance(value, int | float) or math.isnan(value):
        raise ValueError(f"got {value!r}, expected a number, or null for infinity")
    return float(value)


def _several(read_one: Callable[[Any], Any]) -> Callable[[Any], tuple[Any, ...]]:
    def read_all(value: Any) -> tuple[Any, ...]:
        if not isinstance(value, list):
            raise ValueError(f"got {value!r}, expected a list")
        return tuple(read_one(v) for v in value)

    return read_all


def _activations(value: Any) -> dict[str, Any]:
    found = _fields(value, _ACTIVATIONS)
    if missing := [name for name in _ACTIVATIONS if name not in found]:
        raise ValueError(f"{missing[0]!r} is missing")
    return found


_ACTIVATIONS: dict[str, Callable[[Any], Any]] = {
    "tau": _number,
    "first": _several(_number),
    "first_dim": _several(_whole),
    "text": _several(_number),
    "text_dim": _several(_whole),
    "visual": _several(_number),
    "visual_dim": _several(_whole),
    "text_sinks": _several(_number),
    "visual_sinks": _several(_number),
}
_READERS: dict[str, Callable[[Any], Any]] = {
    "model": _text,
    "layer_contribution": _several(_number),
    "sink_dims": _several(_whole),
    "head_ratio": _several(_several(_number)),
    "samples": _whole,
    "source": _text,
    "contribution_error": _several(_number),
    "activations": _activations,
}
_PER_LAYER = {"layer_contribution", "contribution_error", "head_ratio", *_ACTIVATIONS} - {"tau"}
