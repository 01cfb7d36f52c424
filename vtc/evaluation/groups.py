"""Which curves stand together in a figure: by where their methods act."""

from __future__ import annotations

from collections.abc import Sequence

from vtc.evaluation.cells import BASELINES
from vtc.evaluation.compression import FULL, build
from vtc.evaluation.table import CurveKey, Row

Curve = tuple[CurveKey, list[Row]]

# more curves than these cannot be told apart in one panel
_TOGETHER, _ALONE = 12, 8
_BEFORE = "in the encoder and before the LLM"
_INSIDE = "in the LLM, to a budget"
_ONE_POINT = "compositions and methods without a budget"
_BASELINE = "baselines"
_ORDER = (_BEFORE, _INSIDE, _ONE_POINT, _BASELINE)


def group(row: Row) -> str:
    """Where the method of a row acts, or that it has no curve, in words."""
    if row["method"] in BASELINES:
        return _BASELINE
    method = build(row["method"], row["options"])
    if method.count == "adaptive":
        return _ONE_POINT
    return _INSIDE if method.site in ("llm_layer", "llm_rows") else _BEFORE


def grouped(curves: Sequence[Curve]) -> list[tuple[str, list[Curve]]]:
    """Curves by panel, with its title.

    All in one without a title where they are few and, but for baselines, of one group.
    """
    found: dict[str, list[Curve]] = {name: [] for name in _ORDER}
    for curve in curves:
        first = next(row for row in curve[1] if row["method"] != FULL)
        found[group(first)].append(curve)
    groups = {name: own for name, own in found.items() if own}
    if len(groups.keys() - {_BASELINE}) <= 1 and len(curves) <= _TOGETHER:
        return [("", list(curves))]
    panels = []
    for name, own in groups.items():
        parts = -(-len(own) // _ALONE)
        each = -(-len(own) // parts)
        for i in range(parts):
            title = f"{name} ({i + 1} of {parts})" if parts > 1 else name
            panels.append((title, own[i * each : (i + 1) * each]))
    return panels
