"""The part of README.md that says how fast it is, written from rows; nothing in it is typed.

    python benchmarks/readme_table.py --add OUT/*/rows.jsonl
    python benchmarks/readme_table.py [--check]

`--add` takes rows that were measured on another machine into `results/` first, each in place of
the one with its key. What stands between the two marks in README.md is replaced.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from vtc.bench.rows import Row, of_one_machine, read, write
from vtc.bench.tables import NONE, added, gib, number, percent, speedup, spread, times
from vtc.errors import InputError, VtcError

ROOT = Path(__file__).parents[1]
RESULTS = Path(__file__).parent / "results"
START, END = "<!-- speed:start -->", "<!-- speed:end -->"
BENCHES = ("ttft", "kernels", "scale")
NAMES = {
    "llava-1.5-7b": "LLaVA-1.5-7B",
    "llava-next-7b": "LLaVA-NeXT-7B",
    "qwen2.5-vl-7b": "Qwen2.5-VL-7B",
    "internvl3-8b": "InternVL3-8B",
}
TARGETS = ("vtc_cls", "todre", "flowcut")
# one shape of each operation
HEADLINES = {
    "attention_rows": "ViT-L block, 5 crops",
    "attention_received": "16,384 tokens, 16 heads",
    "causal_mass": "Llama layer, 1 × 2,979 entries",
    "greedy_diverse": "max_sum, 2,880 → 640",
    "greedy_map": "576 → 64",
    "group_topk": "32 × 2,880 → 320",
    "compact": "8 × 2,944 → 640 × 4096",
    "packed_index": "8 × 2,944 → 640",
    "group_merge": "8 × 2,880 → 320 × 4096",
}

Table = list[list[str]]


def markdown(table: Table) -> str:
    """A table with its first line as the head."""
    head, *lines = table
    rows = [head, ["---"] * len(head), *lines]
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def section(found: dict[str, list[Row]]) -> str:
    """All that stands between the marks.

    Raises:
        InputError: there are no times to the first logits.
    """
    timed = [r for r in found["ttft"] if r["meaningful"] and "ttft_ms" in r]
    if not timed:
        raise InputError(
            "no time to the first logits was measured: run benchmarks/ttft.py on a GPU"
        )
    parts = [_about(timed), markdown(first_logits(timed))]
    if len(whole := generates(timed)) > 1:
        parts += ["Whole `generate` of 128 tokens:", markdown(whole)]
    if len(beside := kernels(found["kernels"])) > 1:
        what = "Kernels (medians on the device: launched one by one, and in a graph), the plain "
        what += "torch operation, and the official way:"
        parts += [what, markdown(beside)]
    return "\n\n".join([*parts, *memory(found["scale"])])


def _about(rows: Sequence[Row]) -> str:
    where = sorted({str(row["gpu"]) for row in rows})
    when = sorted({f"{row['date']}, {row['commit']}" for row in rows})
    first = rows[0]
    with_what = f"torch {first['torch']}, transformers {first['transformers']}"
    return (
        "Milliseconds from pixel values on the GPU to the first logits, median of at least "
        f"{min(row['runs'] for row in rows)} runs (20th to 80th percentile); {', '.join(where)}, "
        f"bfloat16, sdpa, random weights, {with_what}; {'; '.join(when)}. *Same path* is the "
        'stock model under `fast=True` (*fast*) or `fast="compile"`. *Selection* is the share of '
        "scores, choice and gather in the time, *added* the same with what the encoder takes "
        "longer than stock's."
    )


def first_logits(rows: Sequence[Row]) -> Table:
    """A line for each model, batch, budget, method and captured path of the targets."""
    head = ["", "method", "path", "stock", "stock, same path", "eager", "here", "× stock"]
    lines = [[*head, "× same path", "`generate` of one token", "selection", "added"]]
    shown = [r for r in rows if r["method"] in TARGETS and r["path"] != "eager"]
    models = list(NAMES)
    for row in sorted(shown, key=lambda r: (_place(models, r), r["batch"], r["keep"])):
        stock, paths = row["stock"], ("eager", row["path"])
        eager = _same(rows, row, "eager")
        lines.append(
            [
                _case(row),
                f"`{row['method']}`",
                row["path"],
                *(number(stock.get(path, {}).get("ttft_ms")) for path in paths),
                number(eager.get("ttft_ms")),
                spread(row, "ttft_ms"),
                *(times(speedup(row, path)) for path in paths),
                _generate(row),
                percent(row.get("selection_share")),
                percent(added(row)),
            ]
        )
    return lines


def _place(models: list[str], row: Row) -> int:
    return models.index(row["model"]) if row["model"] in models else len(models)


def _generate(row: Row) -> str:
    of = [times(speedup(row, path, "generate_1_ms")) for path in ("eager", row["path"])]
    return f"{number(row['generate_1_ms'])} ({of[0]}, {of[1]})"


def generates(rows: Sequence[Row]) -> Table:
    """A line for each whole generate of many tokens."""
    lines = [["", "method", "path", "ms", "ms per later token", "× stock", "× same path"]]
    for row in rows:
        if "generate_ms" not in row:
            continue
        lines.append(
            [
                _case(row),
                f"`{row['method']}`",
                row["path"],
                spread(row, "generate_ms"),
                number(row["tpot_ms"]),
                times(speedup(row, "eager", "generate_ms")),
                times(speedup(row, row["path"], "generate_ms")),
            ]
        )
    return lines


def kernels(rows: Sequence[Row]) -> Table:
    """A line for each operation, at one shape."""
    lines = [["operation", "shape", "kernel", "in a graph", "torch", "official way"]]
    lines[0].append("of the ceiling")
    for op, case in HEADLINES.items():
        own = {r["provider"]: r for r in rows if (r["op"], r["case"]) == (op, case)}
        kernel = own.get("triton", {})
        if "ms" not in kernel or not kernel["meaningful"]:
            continue
        beside = [_beside(own.get(name, {}), kernel) for name in ("torch", "official")]
        share = percent(kernel["of_floor"])
        alone = [f"{number(kernel.get(name))} ms" for name in ("ms", "graph_ms")]
        lines.append([f"`{op}`", case, *alone, *beside, share])
    return lines


def memory(rows: Sequence[Row]) -> list[str]:
    """A sentence for each axis: how far stock goes, and how far beyond that compression was
    tried."""
    found = []
    for axis, unit in (("images", "images in one prompt"), ("batch", "prompts of one image")):
        own = [r for r in rows if r["axis"] == axis and r["meaningful"]]
        over = [r[axis] for r in own if r["method"] == "stock" and _is_over(r)]
        fast = [r for r in own if r["path"] != "eager" and "ttft_ms" in r]
        if not fast:
            continue
        last = max(fast, key=lambda r: r[axis])
        about = f"{NAMES.get(last['model'], last['model'])}, {unit}: "
        stock = (
            f"stock is out of memory at {min(over)}" if over else "stock has memory for all tried"
        )
        peak = gib(last.get("peak_memory_bytes"))
        taken = f"{number(last['ttft_ms'])} ms and {peak} GiB for {last[axis]}"
        found.append(f"{about}{stock}; `{last['method']}` → {last['keep']} takes {taken}.")
    return found


def _is_over(row: Row) -> bool:
    return bool(row.get("failed") == "out of memory")


def _beside(row: Row, kernel: Row) -> str:
    if "ms" not in row:
        return NONE
    return f"{number(row['ms'])} ms ({times(row['ms'] / kernel['ms'])})"


def _case(row: Row) -> str:
    batch = "" if row["batch"] == 1 else f", batch {row['batch']}"
    kept = "" if row["keep"] is None else f" → {row['keep']}"
    name = NAMES.get(row["model"], row["model"])
    return f"{name}{batch}, {row['visual_tokens']:,}{kept}"


def _same(rows: Sequence[Row], row: Row, path: str) -> Row:
    """The row of the same method on another path."""
    names = ("model", "batch", "method", "keep", "attention")
    wanted = {name: row[name] for name in names} | {"path": path}
    return next((r for r in rows if all(r[k] == v for k, v in wanted.items())), {})


def written(text: str, part: str) -> str:
    """A README with this part between its marks.

    Raises:
        InputError: the marks are not there, once each and in order.
    """
    before, start, rest = text.partition(START)
    _, end, after = rest.partition(END)
    if not start or not end or START in after or END in before + after:
        raise InputError(f"the README holds no {START} … {END}, expected both once: put them there")
    return f"{before}{START}\n{part}\n{END}{after}"


def take(path: Path, results: Path) -> None:
    """Take rows measured elsewhere into the results."""
    rows = read(path)
    if toys := sum(not row["meaningful"] for row in rows):
        raise InputError(f"{path} holds {toys} rows of toy shapes, expected none: they say nothing")
    for bench in BENCHES:
        own = [row for row in rows if row["bench"] == bench]
        if own:
            target = results / bench / "rows.jsonl"
            target.parent.mkdir(parents=True, exist_ok=True)
            write(target, [*read(target), *own])


def main(given: Sequence[str] | None = None) -> int:
    """1 if --check finds another text than the rows give, 2 if there is nothing to write."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--add", nargs="+", type=Path, default=[], metavar="ROWS")
    parser.add_argument("--check", action="store_true", help="write nothing")
    parser.add_argument("--readme", type=Path, default=ROOT / "README.md")
    parser.add_argument("--results", type=Path, default=RESULTS)
    args = parser.parse_args(given)
    try:
        for path in args.add:
            take(path, args.results)
        found = {
            bench: of_one_machine(read(args.results / bench / "rows.jsonl")) for bench in BENCHES
        }
        before = args.readme.read_text()
        text = written(before, section(found))
    except (VtcError, OSError) as error:
        print(error, file=sys.stderr)
        return 2
    if args.check:
        return int(text != before)
    args.readme.write_text(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
