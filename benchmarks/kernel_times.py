"""Kernels beside plain torch and the official implementations' way, against the card's ceilings.

    python benchmarks/kernel_times.py --out OUT

Nothing is timed unless the kernel's result is that of the operation (exit status 1). `--tiny` tries
it on a CPU, with TRITON_INTERPRET=1 the kernels as well. Not called `kernels.py`: beside the other
scripts that would be Hugging Face's package of this name to transformers.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

import torch

from vtc.bench import kernels, script, tables
from vtc.bench.kernel_cases import cases

RESULTS = Path(__file__).parent / "results" / "kernels"


def main(given: Sequence[str] | None = None) -> int:
    """1 if a kernel was not equal to its operation."""
    parser = script.parser(__doc__, RESULTS)
    known = tuple(dict.fromkeys(case.op for case in cases()))
    parser.add_argument("--ops", type=script.one_of(known), help="names separated by commas")
    parser.add_argument("--compile", action="store_true", help="torch.compile too: takes minutes")
    parser.add_argument("--no-graphs", action="store_true", help="not as CUDA graphs besides")
    args = parser.parse_args(given)
    providers = tuple(p for p in kernels.PROVIDERS if p != "compile" or args.compile)
    store = script.store(args)
    settings = kernels.Settings(
        torch.device(args.device), args.tiny, args.ops, providers, not args.no_graphs
    )
    green = kernels.run(settings, store)
    script.show(args, tables.kernel_table(store.added))
    return int(not green)


if __name__ == "__main__":
    sys.exit(main())
