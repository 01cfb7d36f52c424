"""How `keep` is written on a command line and in lmms-eval's `model_args`."""

from __future__ import annotations

import re

from vtc.errors import OptionError
from vtc.types import Budget

_FIX = "write a fraction in (0, 1] such as 0.11, or tokens per image such as 64 or 64tok"


def parse_keep(text: str | int | float) -> float | int:
    """A fraction (float) or a number of tokens per image (int).

    `"0.11"` and `"1.0"` are fractions, `"64"`, `"64tok"` and `"1tok"` are tokens. A bare 1 could
    mean either, so it is refused, also as the int that lmms-eval makes of `keep=1`.

    Raises:
        OptionError: a bare 1, not a number, or out of range.
    """
    if isinstance(text, str):
        written = text.strip()
        if tokens := re.fullmatch(r"([+-]?\d+)tok", written):
            return _checked(int(tokens[1]))
        try:
            value = int(written) if re.fullmatch(r"[+-]?\d+", written) else float(written)
        except ValueError:
            raise OptionError(f"keep={text!r} is not a number: {_FIX}") from None
    else:
        value = text
    if isinstance(value, int) and not isinstance(value, bool) and value == 1:
        raise OptionError("keep=1 could be everything or one token: write 1.0 or 1tok")
    return _checked(value)


def _checked(value: float | int) -> float | int:
    keep = Budget.of(value).keep
    if keep is None:
        raise OptionError(f"keep=None is not a number: {_FIX}")
    return keep
