"""What each method's choice costs at 7B: scores, selection, merging and gather.

    python benchmarks/selection_times.py --out OUT
    python benchmarks/selection_times.py --table

576 → 64 tokens on LLaVA-1.5 and 2,880 → 320 on LLaVA-NeXT, one prompt, events inside the run.
`selector_ms` is all that happens behind the encoder and, for decisions between decoder layers,
between them; what a method reads off the encoder while it runs is in `encoder_ms`. No speed-up is
claimed here. `--table` writes `selection.md` from the rows; it needs no GPU.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch

import vtc
from vtc.bench import script, splits
from vtc.bench.families import SHAPES, tiny
from vtc.bench.measure import attempt, emptied
from vtc.bench.progress import Progress
from vtc.bench.providers import PATHS, Provider, over_layers, with_keep
from vtc.bench.rows import Row, of_one_machine, read
from vtc.bench.shapes import build, sharpen
from vtc.bench.tables import NONE, spread
from vtc.bench.timing import named, whole_ms

RESULTS = Path(__file__).parent / "results" / "selection"
KEEPS = {"llava-1.5-7b": 64, "llava-next-7b": 320}
LIMIT_MS = 5
_WARM = 3


def main(given: Sequence[str] | None = None) -> int:
    """1 if something went wrong."""
    parser = script.parser(__doc__, RESULTS)
    add = parser.add_argument
    add("--models", type=script.one_of(tuple(KEEPS)), default=tuple(KEEPS), help="by commas")
    add("--methods", type=script.listed, help="(default: all that choose tokens)")
    add("--runs", type=int, default=20, help="of each (default: %(default)s)")
    add("--table", action="store_true", help="write selection.md from the rows, measure nothing")
    args = parser.parse_args(given)
    if args.table:
        folder = args.out or RESULTS
        rows = of_one_machine(read(folder / script.ROWS))
        (folder / "selection.md").write_text(markdown(rows))
        return 0
    store = script.store(args)
    fine = True
    methods = args.methods or choosing()
    with Progress("selection", len(args.models) * len(methods) * len(PATHS)) as progress:
        for name in args.models:
            for row in _of_model(name, methods, args):
                store.add(row)
                fine &= row.get("failed") != "error"
                told = row.get("reason") or f"{row['selector_ms']:.3f} ms"
                progress.step(f"{name}, {row['method']} {row['path']}: {told}")
    script.show(args, table(store.added))
    return int(not fine)


def choosing() -> list[str]:
    """The registered methods that choose tokens."""
    adaptive = [name for name in vtc.methods() if vtc.method(name).count == "adaptive"]
    return [m for m in (*with_keep(), *adaptive) if m != "none" and not over_layers(m)]


def _of_model(name: str, methods: Sequence[str], args: Any) -> Iterator[Row]:
    shape = tiny(SHAPES[name]) if args.tiny else SHAPES[name]
    keep = max(1, round(KEEPS[name] * shape.visual / SHAPES[name].visual))
    emptied(torch.device(args.device))  # the model before this one
    model = build(shape, args.device, torch.float32 if args.tiny else torch.bfloat16)
    sharpen(model)
    inputs = shape.inputs(1, next(model.parameters()), 1)
    for method in methods:
        kept = None if vtc.method(method).count == "adaptive" else keep
        for path in PATHS:
            provider = Provider(method, kept, path)
            measure = partial(_measured, model, inputs, provider, args.runs)
            about = {"bench": "selection", "model": name, **provider.to_dict()}
            about |= {"visual_tokens": shape.visual, "dtype": str(model.dtype).split(".")[-1]}
            about["meaningful"] = model.device.type == "cuda" and not args.tiny
            yield about | attempt(measure, model.device)


@torch.no_grad()
def _measured(model: Any, inputs: Any, provider: Provider, runs: int) -> Row:
    def forward() -> Any:
        return model(**inputs, logits_to_keep=1)

    with provider.on(model) as handle:
        for _ in range(_WARM):
            forward()
        parts, times = [], []
        with splits.encoder_and_selection(model, handle) as take:
            for _ in range(runs):
                times.append(whole_ms(forward, model.device))
                parts.append(take())
        report = handle.report()
    row: Row = named("ttft_ms", times)
    row |= named("selector_ms", [selector or 0.0 for _, selector in parts])
    row |= named("encoder_ms", [encoder or 0.0 for encoder, _ in parts])
    row |= {"runs": runs, "kept_tokens": list(report.kept_tokens), "fast": report.fast}
    return row | {"kernels": report.kernels}


def table(rows: Sequence[Row]) -> list[list[str]]:
    """A line for each method: eager and captured, both models."""
    columns = [(model, path) for model in KEEPS for path in PATHS]
    lines = [["method", *(f"{model} → {KEEPS[model]}, {path}" for model, path in columns)]]
    for method in dict.fromkeys(row["method"] for row in rows):
        own = {(r["model"], r["path"]): r for r in rows if r["method"] == method}
        lines.append([method, *(_cell(own.get(column)) for column in columns)])
    return lines


def _cell(row: Row | None) -> str:
    if row is None:
        return NONE
    return row["failed"] if "failed" in row else spread(row, "selector_ms")


def markdown(rows: Sequence[Row]) -> str:
    """The table with what was measured on, and which methods are above the limit."""
    head, *lines = table(rows)
    first = rows[0]
    about = f"{first['gpu']}, {first['dtype']}, torch {first['torch']}, {first['date']}"
    commits = ", ".join(sorted({row["commit"] for row in rows}))
    text = [f"Milliseconds of choice (median, 20th to 80th percentile); {about}; {commits}.", ""]
    text += [f"| {' | '.join(row)} |" for row in (head, ["---"] * len(head), *lines)]
    return "\n".join([*text, "", *_above(rows), ""])


def _above(rows: Sequence[Row]) -> list[str]:
    """A line for each time above the limit, with the reason that its own report gave."""
    slow = [r for r in rows if r.get("selector_ms", 0) > LIMIT_MS]
    if not slow:
        return [f"None is above {LIMIT_MS} ms."]
    lines = [["above " + str(LIMIT_MS) + " ms", "model", "path", "ms", "why"]]
    for row in slow:
        ms = f"{row['selector_ms']:.1f}"
        lines.append([row["method"], row["model"], row["path"], ms, reason(row, rows)])
    lines.insert(1, ["---"] * len(lines[0]))
    return [f"| {' | '.join(line)} |" for line in lines]


def reason(row: Row, rows: Sequence[Row]) -> str:
    """Why a choice takes long, from what was measured: what is not captured is launched step by
    step by the host, and the report says why it is not."""
    if row["path"] == "eager":
        same = (r for r in rows if (r["method"], r["model"]) == (row["method"], row["model"]))
        fast = next((r for r in same if r["path"] != "eager" and "selector_ms" in r), None)
        least = f": captured as far as it can be, {fast['selector_ms']:.2f} ms" if fast else ""
        return f"launched one operation at a time{least}"
    said = row.get("fast") or {}
    for part in ("selection", "prefill"):
        why = str(said.get(part, "cuda")).split("; then ")[-1]
        if why not in ("cuda", "not run"):
            return f"not captured: {why.removeprefix('it cannot be captured: ')}"
    return "captured whole; the work itself takes that long"


if __name__ == "__main__":
    sys.exit(main())
