"""`vtc methods`: what there is, what it promises, and which layers it reads on a given model."""

from __future__ import annotations

import argparse
import dataclasses
import json
from typing import Any

import vtc
from vtc.commands import models, support
from vtc.commands.files import table
from vtc.methods.base import Method


def run(args: argparse.Namespace) -> int:
    """Print the table, or JSON."""
    if args.markdown or args.families:
        models.quiet()
        print(support.markdown() if args.markdown else _families(), end="")
        return 0
    adapter = encoder = None
    if args.model is not None:
        from vtc.adapters.registry import adapter_of

        models.quiet()
        adapter = adapter_of(models.skeleton(args.model))
        encoder = adapter.encoder()
    rows = [_describe(vtc.method(name), adapter) for name in vtc.methods()]
    if args.json:
        print(json.dumps(rows, indent=2))
        return 0
    reads = ["reads"] if encoder else []
    columns = ["method", "acts", "count", "equals", "positions", "what", *reads]
    print(table([columns, *([str(row[c]) for c in columns] for row in rows)]))
    print(
        "\ncount: exact, at most, or adaptive (the method decides: leave keep out)\n"
        "equals: what a compressed model is tested against; mask: the stock model with dropped\n"
        "        tokens masked out (layer_mask: from a decoder layer on), restatement: the method\n"
        "        written out in plain torch\n"
        'positions: what positions="published" means'
    )
    if encoder:
        cls = "with" if encoder.has_cls else "without"
        print(
            f"reads: blocks of this {encoder.depth}-block encoder {cls} [CLS] and decoder layers, "
            "counted from 0"
        )
        for row in rows:
            if row["needs"]:
                print(f"{row['method']} needs a calibration: {row['needs']}")
    return 0


def _families() -> str:
    """Which method works on which family."""
    rows = []
    for name in vtc.methods():
        method = vtc.method(name)
        for family, adapter in zip(support.family_names(), support.skeletons(), strict=True):
            found = support.support(method, adapter)
            rows.append([name, family, str(found), "; ".join(found.notes) or "-"])
    return table([["method", "family", "acts", "notes"], *rows]) + "\n"


def _describe(method: Method, adapter: Any) -> dict[str, Any]:
    options = {f.name: getattr(method, f.name) for f in dataclasses.fields(method)}
    row: dict[str, Any] = {
        "method": method.name,
        "what": method.summary,
        "acts": support.SITES[method.site],
        "count": method.count.replace("_", " "),
        "equals": method.exactness,
        "positions": method.published_positions,
        "options": {name: value for name, value in options.items() if value is not None},
    }
    if adapter is not None:
        found = support.support(method, adapter)
        notes = [note for note in found.notes if note != support.NEEDS]
        row["reads"] = "; ".join([str(found), *notes])
        row["needs"] = found.needs
    return row
