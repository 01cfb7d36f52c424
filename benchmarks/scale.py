"""Time to the first logits and memory against images and against prompts, at 7B.

    python benchmarks/scale.py --out OUT

One prompt of 1 to 32 images, and 1 to 32 prompts of one; beyond that until the stock model is out
of memory, which is a row of its own. `--tiny` tries it on a CPU.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from vtc.bench import scale, script, tables
from vtc.bench.families import SHAPES
from vtc.bench.providers import PATHS, ROUTES

RESULTS = Path(__file__).parent / "results" / "scale"


def main(given: Sequence[str] | None = None) -> int:
    """1 if something was not equal, or went wrong."""
    parser = script.parser(__doc__, RESULTS)
    add = parser.add_argument
    add("--model", choices=tuple(SHAPES), default="llava-next-7b")
    add("--method", default="vtc_cls")
    add("--keep", type=int, default=160, help="tokens of each image (default: %(default)s)")
    add("--axes", type=script.one_of(scale.AXES), default=scale.AXES, help="images, batch")
    add("--points", type=script.numbers, help="(default: 1,2,4,8,16,32; tiny: 1,2)")
    beyond = "until the stock model is out of memory (default: 40,48,64)"
    add("--beyond", type=script.numbers, default=scale.BEYOND, help=beyond)
    add("--paths", type=script.one_of(ROUTES), default=PATHS, help="of the method")
    add("--runs", type=int, help="of each point (default: 5, tiny: 2)")
    args = parser.parse_args(given)
    store = script.store(args)
    settings = scale.Settings(
        args.device,
        args.model,
        args.method,
        args.keep,
        args.axes,
        args.points or (scale.POINTS[:2] if args.tiny else scale.POINTS),
        args.beyond,
        args.paths,
        args.runs or (2 if args.tiny else 5),
        args.tiny,
    )
    green = scale.run(settings, store)
    script.show(args, tables.scale_table(store.added))
    return int(not green)


if __name__ == "__main__":
    sys.exit(main())
