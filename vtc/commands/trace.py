"""`vtc trace`: compute rows of a sweep's table again from its samples, and show where they lie."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Mapping, Sequence
from itertools import islice
from typing import Any

from vtc.evaluation.evaluate import require_extra

_LINES, _WIDTH = 3, 160


def run(args: argparse.Namespace) -> int:
    """Print the rows, their files and what differs; 1 if anything does."""
    require_extra()
    from vtc.evaluation.printed import area_by_column, by_column
    from vtc.evaluation.trace import CHOICES, trace, trace_areas

    wanted = {name: getattr(args, name) for name in CHOICES}
    found = (trace_areas if args.area else trace)(args.out, **wanted)
    if args.json:
        print(json.dumps([_as_json(one) for one in found], indent=2))
    else:
        _show(found, area_by_column if args.area else by_column)
    return int(any(one.differences for one in found))


def _as_json(one: Any) -> dict[str, Any]:
    return {
        "row": one.row,
        "files": [str(path) for path in one.files],
        "differences": [vars(gap) for gap in one.differences],
    }


def _show(found: Sequence[Any], said: Callable[[Any], Mapping[str, str]]) -> None:
    for one in found:
        row = one.row
        print(f"{row['model']}, {row['task']}, {row['n']} questions")
        print("  " + "  ".join(f"{column}: {text}" for column, text in said(row).items()))
        if len(found) == 1:
            for name, value in row.items():
                print(f"  {name} = {value}")
        for path in one.files:
            print(f"  {path}")
            if len(found) == 1:
                with path.open(encoding="utf-8") as lines:
                    for line in islice(lines, _LINES):
                        cut = line.rstrip()
                        print(f"    {cut if len(cut) <= _WIDTH else cut[:_WIDTH] + ' …'}")
        for gap in one.differences:
            print(f"  differs: {gap}")
    wrong = sum(bool(one.differences) for one in found)
    if wrong:
        print(f"{wrong} of {len(found)} rows are not what their samples give")
    else:
        print(f"computed again from the samples: {len(found)} of {len(found)} rows are the same")
