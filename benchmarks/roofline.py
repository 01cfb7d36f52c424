"""Pictures and a table of the rows of `ttft.py`, `kernel_times.py` and `scale.py`.

    python benchmarks/roofline.py --plot

Where the time goes against the floor at measured ceilings, the roofline, the encoder block by
block, kernels, and scale. Nothing is measured here: it needs matplotlib and no GPU.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

# Python may have been told not to look beside a script
sys.path.append(str(Path(__file__).parent))

from figures.blocks import block_plot
from figures.operations import kernel_plot
from figures.parts import parts_plot
from figures.roof import roof_plot
from figures.scaling import scale_plot

from vtc.bench.rows import Row, of_one_machine, read
from vtc.bench.tables import number, percent

RESULTS = Path(__file__).parent / "results"
HEAD = ("model", "batch", "method", "keep", "path", "encoder", "floor", "selection", "gather floor")
HEAD += ("prefill", "floor", "later token", "floor", "of the first logits' floor")


def arguments(given: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    rows = "folder with ttft/, kernels/ and scale/, each with a rows.jsonl (default: %(default)s)"
    parser.add_argument("--rows", type=Path, default=RESULTS, help=rows)
    parser.add_argument(
        "--out", type=Path, help="folder of pictures and table (default: --rows/roofline)"
    )
    parser.add_argument("--plot", action="store_true", help="draw; without it only the table")
    return parser.parse_args(given)


def parts_table(rows: Sequence[Row]) -> str:
    """Milliseconds of each part and their floors, as Markdown."""
    lines = [f"| {' | '.join(HEAD)} |", "|---" * len(HEAD) + "|"]
    for row in rows:
        if "encoder_ms" not in row:
            continue
        floor = row["floor_ms"]
        least = floor["encoder"] + floor["prefill"]
        cells = [
            row["model"],
            row["batch"],
            f"`{row['method']}`",
            row["keep"] or "all",
            row["path"],
        ]
        cells += [number(row["encoder_ms"]), number(floor["encoder"])]
        cells += [number(row.get("selector_ms")), number(floor["gather"])]
        cells += [number(row.get("prefill_ms")), number(floor["prefill"])]
        cells += [number(row.get("tpot_ms")), number(floor["decode"])]
        cells.append(percent(least / row["ttft_ms"]))
        lines.append(f"| {' | '.join(map(str, cells))} |")
    return "\n".join(lines) + "\n"


def main(given: Sequence[str] | None = None) -> int:
    """2 if there are no rows."""
    args = arguments(given)
    found = {
        name: of_one_machine(read(args.rows / name / "rows.jsonl"))
        for name in ("ttft", "kernels", "scale")
    }
    if not any(found.values()):
        print(f"no rows under {args.rows}: run ttft.py, kernel_times.py, scale.py", file=sys.stderr)
        return 2
    out: Path = args.out or args.rows / "roofline"
    out.mkdir(parents=True, exist_ok=True)
    if found["ttft"]:
        (out / "parts.md").write_text(parts_table(found["ttft"]))
    for name, content in (pictures(found) if args.plot else {}).items():
        (out / name).write_bytes(content)
    return 0


def pictures(found: dict[str, list[Row]]) -> dict[str, bytes]:
    """The files' contents by name."""
    drawn = {}
    if found["ttft"]:
        drawn |= {"parts": parts_plot(found["ttft"]), "roofline": roof_plot(found["ttft"])}
        drawn["encoder_blocks"] = block_plot(found["ttft"])
    if found["kernels"]:
        drawn["kernels"] = kernel_plot(found["kernels"])
    if found["scale"]:
        drawn["scale"] = scale_plot(found["scale"])
    return {f"{n}.{e}": c for n, files in drawn.items() for e, c in (files or {}).items()}


if __name__ == "__main__":
    sys.exit(main())
