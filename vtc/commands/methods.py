"""`vtc methods`: what there is, what it promises, and which layers it reads on a given model."""

from __future__ import annotations

import argparse
import dataclasses
import json
from typing import Any

import vtc
from vtc.commands import models
from vtc.commands.files import table
from vtc.errors import VtcError
from vtc.methods.base import Method

_SITES = {"pixels": "before the encoder", "llm_input": "before the LLM"}


def run(args: argparse.Namespace) -> int:
    """Print the table, or JSON."""
    encoder = None
    if args.model is not None:
        from vtc.adapters.registry import adapter_of

        models.quiet()
        encoder = adapter_of(models.skeleton(args.model)).encoder()
    rows = [_describe(vtc.method(name), encoder) for name in vtc.methods()]
    if args.json:
        print(json.dumps(rows, indent=2))
        return 0
    reads = ["reads"] if encoder else []
    columns = ["method", "acts", "count", "equals", "positions", "what", *reads]
    print(table([columns, *([str(row[c]) for c in columns] for row in rows)]))
    print(
        "\ncount: exact, at most, or adaptive (the method decides: leave keep out)\n"
        "equals: what a compressed model is tested against; mask: the stock model with dropped\n"
        "        tokens masked out, restatement: the method written out in plain torch\n"
        'positions: what positions="published" means'
    )
    if encoder:
        cls = "with" if encoder.has_cls else "without"
        print(f"reads: blocks of this {encoder.depth}-block encoder {cls} [CLS], counted from 0")
    return 0


def _describe(method: Method, encoder: Any) -> dict[str, Any]:
    options = {f.name: getattr(method, f.name) for f in dataclasses.fields(method)}
    row: dict[str, Any] = {
        "method": method.name,
        "what": method.summary,
        "acts": _SITES.get(method.site, method.site),
        "count": method.count.replace("_", " "),
        "equals": method.exactness,
        "positions": method.published_positions,
        "options": {name: value for name, value in options.items() if value is not None},
    }
    if encoder is not None:
        row["reads"] = _reads(method, encoder)
    return row


def _reads(method: Method, encoder: Any) -> str:
    """The encoder blocks that a method's signals resolve to, or why it cannot run."""
    from vtc.runtime.signals import EncoderSignals

    try:
        EncoderSignals(encoder, method.needs)
        windows = [s.resolve(encoder.depth, encoder.tap) for s in method.needs if s.blocks]
    except VtcError as error:
        return f"refused: {error}"
    return ", ".join(_span(w) for w in windows if w) or "-"


def _span(blocks: tuple[int, ...]) -> str:
    if len(blocks) > 2 and blocks == tuple(range(blocks[0], blocks[-1] + 1)):
        return f"{blocks[0]}..{blocks[-1]}"
    return ",".join(map(str, blocks))
