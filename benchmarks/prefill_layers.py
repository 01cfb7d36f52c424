"""Prefill time per number of decoder layers that visual rows skip, beside token dropping, at 7B.

    python benchmarks/prefill_layers.py --out OUT
    python benchmarks/prefill_layers.py --plot OUT/rows.jsonl [--accuracy table.json]

Stock LLaVA-1.5 and LLaVA-NeXT of real size with random weights in bfloat16, through the public
interface: `vtc.patch` and `generate` of one token. Nothing is timed, and no row written, unless the
logits of copies with few layers equal plain torch. `--tiny` tries it all on a CPU.
"""

from __future__ import annotations

import argparse
import gc
import json
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

# Python may have been told not to look beside a script
sys.path.append(str(Path(__file__).parent))

from prefill import equal_accuracy, figure, parity
from prefill.providers import Provider, providers
from prefill.sizes import SIZES, Size, fewer, tiny
from prefill.stopwatch import Stopwatch
from prefill.work import arithmetic, counting

from vtc.bench.shapes import build
from vtc.bench.stamp import commit, stamp
from vtc.bench.timing import quantiles
from vtc.plans import LayerPlan

Row = dict[str, Any]
ROWS = "rows.jsonl"
WARM_CALLS = 2
_START = time.perf_counter()


def arguments(given: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--out", type=Path, help="folder; of --plot by default that of its file")
    parser.add_argument("--sizes", default=",".join(SIZES), help="separated by commas")
    parser.add_argument("--tiny", action="store_true", help="toy models, to try the script")
    # each visit starts with a call that is not timed: 20 timed calls of each provider
    parser.add_argument("--rounds", type=int, help="visits to each provider (4, tiny: 1)")
    parser.add_argument("--calls", type=int, help="timed calls of a visit (5, tiny: 2)")
    parser.add_argument("--commit", default=commit(), help="of the code, where git is not there")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--plot", type=Path, metavar="ROWS", help="only draw rows measured before")
    parser.add_argument("--accuracy", type=Path, metavar="TABLE", help="table.json of a sweep")
    args = parser.parse_args(given)
    if args.out is None and args.plot is None:
        parser.error("one of --out and --plot is needed")
    args.rounds = args.rounds or (1 if args.tiny else 4)
    args.calls = args.calls or (2 if args.tiny else 5)
    args.sizes = args.sizes.split(",")
    if unknown := [name for name in args.sizes if name not in SIZES]:
        parser.error(f"--sizes names {', '.join(unknown)}, expected of {', '.join(SIZES)}")
    return args


def say(text: str) -> None:
    """Progress, on stderr."""
    print(f"{time.perf_counter() - _START:6.1f} s  {text}", file=sys.stderr, flush=True)


def prefill(model: Any, inputs: dict[str, Any]) -> None:
    """The call that is measured."""
    model.generate(**inputs, max_new_tokens=1, do_sample=False)


def observed(
    model: Any, size: Size, provider: Provider, handle: Any, inputs: dict[str, Any]
) -> Row:
    """What one call of a provider computes and keeps."""
    prefill(model, inputs)
    depth = len(model.model.language_model.layers)
    plan = handle.plans[0] if handle and handle.plans else LayerPlan.stock(depth)
    skipped = [layer for layer, active in enumerate(plan.active) if not active]
    layer = skipped[0] if skipped else depth - 1
    if cuda := model.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(model.device)
    with counting(model, layer) as work:
        prefill(model, inputs)
    report = handle.report() if handle else None
    mean = report.layer_mean_tokens if report else float(size.visual)
    lengths = report.kv_lengths if report else (size.entries(),) * depth
    parts = len(inputs["input_ids"]), size.entries() - size.visual, lengths, plan.rules
    return {
        "layers_skipped": len(skipped),
        "skipped": skipped,
        "layer_mean_tokens": mean,
        "active_fraction": mean / size.visual,
        "layer_entries": list(lengths),
        "flops": work.flops,
        # the scores of a cut between layers are no part of it
        "flops_arithmetic": None if provider.method == "todre" else arithmetic(model, *parts),
        "linear_rows": {"layer": layer, **work.rows},
        "peak_memory_bytes": torch.cuda.max_memory_allocated(model.device) if cuda else None,
    }


def measure(
    model: Any, size: Size, batch: int, args: argparse.Namespace
) -> list[tuple[Provider, Row]]:
    """What every provider computes, and its times. All shapes are warmed before any is timed, and
    the visits to the providers take turns, so that a drift of the machine meets all of them."""
    inputs = size.inputs(batch, next(model.parameters()))
    found = providers(model, size, batch > 1)
    rows: list[Row] = []
    for provider in found:
        with provider.on(model) as handle:
            rows.append(observed(model, size, provider, handle, inputs))
            for _ in range(WARM_CALLS):
                prefill(model, inputs)
    say(f"{size.name}, batch {batch}: {len(found)} providers are warm")
    times: list[list[tuple[float, float]]] = [[] for _ in found]
    with Stopwatch(model) as watch:
        for turn in range(args.rounds):
            for provider, own in zip(found, times, strict=True):
                with provider.on(model):
                    prefill(model, inputs)
                    own += (watch(lambda: prefill(model, inputs)) for _ in range(args.calls))
            say(f"{size.name}, batch {batch}: round {turn + 1} of {args.rounds}")
    for row, own in zip(rows, times, strict=True):
        for name, part in zip(("prefill_ms", "ttft_ms"), zip(*own, strict=True), strict=True):
            row |= zip((name, f"{name}_p20", f"{name}_p80"), quantiles(list(part)), strict=True)
        row["runs"] = len(own)
    return list(zip(found, rows, strict=True))


def run(args: argparse.Namespace) -> Path:
    """Checks, measures, and returns the file of rows.

    Raises:
        ParityError: nothing was timed.
    """
    sizes = [tiny(SIZES[name]) if args.tiny else SIZES[name] for name in args.sizes]
    gates = {}
    for size in sizes:
        gates[size.name] = parity.check(size, args.device)
        say(f"{size.name}: logits are those of plain torch {json.dumps(gates[size.name])}")
    args.out.mkdir(parents=True, exist_ok=True)
    about = stamp(args.device, args.commit)
    with (args.out / ROWS).open("w") as file:
        # one prompt first, for if time runs out
        for batch, size in sorted(((b, s) for s in sizes for b in s.batches), key=lambda x: x[0]):
            gc.collect()  # models before this one
            model = build(size, args.device, torch.bfloat16)
            say(f"{size.name}: built")
            points = size if args.tiny or batch == 1 else fewer(size)
            for provider, row in measure(model, points, batch, args):
                row |= {"parity": gates[size.name].get(provider.name)}
                print(json.dumps(described(size, batch, provider) | row | about), file=file)
            file.flush()
            del model
    return Path(args.out) / ROWS


def described(size: Size, batch: int, provider: Provider) -> Row:
    """What was run."""
    return {
        "size": size.name,
        "batch": batch,
        "provider": provider.name,
        "kind": provider.kind,
        "method": provider.method,
        "keep": provider.keep,
        "options": provider.told(),
        "skips": provider.skips,
        "visual_tokens": size.visual,
        "newline_tokens": size.newlines,
        "text_tokens": sum(size.text),
        "config": {
            **asdict(size),
            "layers": size.decoder.layers,
            "dtype": "bfloat16",
            "attention": "sdpa",
            "weights": "random",
        },
    }


def read(path: Path) -> list[Row]:
    """Rows of a file."""
    return [json.loads(line) for line in path.read_text().splitlines()]


def draw(path: Path, folder: Path, accuracy: Path | None) -> None:
    """The figure, and the table at equal accuracy if a sweep's table is given."""
    rows = read(path)
    folder.mkdir(parents=True, exist_ok=True)
    for ending, content in figure.prefill_plot(rows).items():
        (folder / f"prefill_layers.{ending}").write_bytes(content)
    if accuracy is not None:
        pairs = equal_accuracy.pairs(rows, json.loads(accuracy.read_text())["summary"])
        (folder / "equal_accuracy.json").write_text(json.dumps(pairs, indent=1) + "\n")
        (folder / "equal_accuracy.md").write_text(equal_accuracy.markdown(pairs))


def main(given: Sequence[str] | None = None) -> int:
    """1 if logits were not those of plain torch; then there are no times."""
    args = arguments(given)
    path: Path = args.plot
    if path is None:
        try:
            path = run(args)
        except parity.ParityError as error:
            say(f"nothing was timed: {error}")
            return 1
    try:
        draw(path, args.out or path.parent, args.accuracy)
    except ModuleNotFoundError as error:  # a machine without matplotlib
        say(f"not drawn: {error}; run it again with --plot {path}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
