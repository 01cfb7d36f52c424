"""The families of trained models: each in its stock classes, with a processor of its own.

A family is a module with `build_processor()`, `build_model(tokenizer, small)` and what its chat
template puts around a question: `BEFORE` it, behind the last picture, and `AFTER` it.
"""

from __future__ import annotations

from types import ModuleType

from vtc.errors import OptionError
from vtc.testbed.families import internvl, llava, qwen2_vl

_MODULES = {"llava": llava, "qwen2_vl": qwen2_vl, "internvl": internvl}
FAMILIES = tuple(_MODULES)


def family(name: str) -> ModuleType:
    """The module of a family.

    Raises:
        OptionError: no such family.
    """
    if name not in _MODULES:
        raise OptionError(f"family: got {name!r}, expected one of {FAMILIES}")
    return _MODULES[name]
