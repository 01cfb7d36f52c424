"""Time to the first logits, per later token and of whole generates at 7B: stock, and compressed.

    python benchmarks/ttft.py --out OUT

Stock models of real size with random weights, eager and with CUDA graphs, through the public
interface. The fast path is only timed where its logits are those of the eager one (else exit
status 1). Rows are written one by one, main targets first. `--tiny` tries it on a CPU.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from vtc.bench import script, tables, ttft
from vtc.bench.families import SHAPES
from vtc.bench.plan import PARTS, Settings
from vtc.bench.providers import PATHS, ROUTES

RESULTS = Path(__file__).parent / "results" / "ttft"


def main(given: Sequence[str] | None = None) -> int:
    """1 if something was not equal, or went wrong."""
    parser = script.parser(__doc__, RESULTS)
    add = parser.add_argument
    add("--models", type=script.one_of(tuple(SHAPES)), default=tuple(SHAPES), help="by commas")
    parts = "targets; LLaVA-1.5's encoder blocks, all methods; flash attention (default: all)"
    add("--parts", type=script.one_of(PARTS), default=PARTS, help=parts)
    paths = "of eager, fast and compile (default: the first two)"
    add("--paths", type=script.one_of(ROUTES), default=PATHS, help=paths)
    add("--methods", type=script.listed, help="instead of those of each part")
    add("--batches", type=script.numbers, default=(1, 8), help="of LLaVA-1.5's targets")
    add("--runs", type=int, help="of each call (default: 20, tiny: 2)")
    add("--generates", type=int, help="of 128 tokens, of the main method (default: 3, tiny: 1)")
    add("--minutes", type=float, help="after which no more providers are begun")
    args = parser.parse_args(given)
    store = script.store(args)
    settings = Settings(
        args.device,
        args.models,
        args.parts,
        args.paths,
        args.methods,
        args.batches,
        runs=args.runs or (2 if args.tiny else 20),
        generates=(1 if args.tiny else 3) if args.generates is None else args.generates,
        new_tokens=4 if args.tiny else 128,
        minutes=args.minutes,
        tiny=args.tiny,
    )
    green = ttft.run(settings, store)
    script.show(args, tables.ttft_table(store.added))
    return int(not green)


if __name__ == "__main__":
    sys.exit(main())
