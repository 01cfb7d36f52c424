"""Rows as tables of text: what is against what, and nothing that was not measured."""

from __future__ import annotations

from collections.abc import Sequence

from vtc.bench.providers import SDPA, STOCK
from vtc.bench.rows import Row

Table = list[list[str]]
NONE = "–"


def speedup(row: Row, path: str, name: str = "ttft_ms") -> float | None:
    """How many times as long the stock model took on a path, in the same process; None where one of
    the two was not measured or was not equal before, and of toys."""
    if (
        not row.get("meaningful")
        or name not in row
        or (row["path"] != "eager" and not row.get("parity"))
    ):
        return None
    beside = row.get("stock", {}).get(path, {}).get(name)
    same = row["method"] == STOCK and row["path"] == path and row["attention"] == SDPA
    return None if beside is None or same else beside / row[name]


def added(row: Row) -> float | None:
    """Share of the time to the first logits that the method adds: scores, choice and gather behind
    the encoder, and what reading it adds to the encoder of the same path."""
    encoder = row.get("stock", {}).get(row.get("path"), {}).get("encoder_ms")
    if row.get("method") == STOCK or None in (encoder, row.get("selector_ms")):
        return None
    more = max(0.0, row["encoder_ms"] - encoder)
    return float((row["selector_ms"] + more) / row["ttft_ms"])


def ttft_table(rows: Sequence[Row]) -> Table:
    """A line for each provider."""
    head = ["model", "batch", "method", "keep", "path", "first logits, ms", "generate(1), ms"]
    head += ["× stock", "× same path", "selection", "added", "128 tokens, ms", "peak GiB"]
    lines = [head]
    for row in rows:
        attention = "" if row["attention"] == SDPA else f" {row['attention']}"
        about = [row["model"], str(row["batch"]), row["method"], _keep(row["keep"])]
        about.append(row["path"] + attention)
        if "failed" in row:
            lines.append([*about, f"{row['failed']}: {row['reason']}"[:60], *[NONE] * 7])
            continue
        lines.append(
            [
                *about,
                spread(row, "ttft_ms"),
                spread(row, "generate_1_ms"),
                times(speedup(row, "eager")),
                times(speedup(row, row["path"])),
                percent(row.get("selection_share")),
                percent(added(row)),
                spread(row, "generate_ms"),
                gib(row.get("peak_memory_bytes")),
            ]
        )
    return lines


def kernel_table(rows: Sequence[Row]) -> Table:
    """A line for each operation and shape."""
    head = ["operation", "shape", "kernel, ms", "as a graph, ms", "torch, ms", "official, ms"]
    head += ["× torch", "× compiled", "× official", "official way", "of the ceiling", "memory"]
    lines = [head]
    for op, case in dict.fromkeys((row["op"], row["case"]) for row in rows):
        own = {r["provider"]: r for r in rows if (r["op"], r["case"]) == (op, case)}
        kernel = own.get("triton", {})
        beside = [
            times(_ratio(own.get(name, {}), kernel)) for name in ("torch", "compile", "official")
        ]
        official = own.get("official", {})
        lines.append(
            [
                op,
                case,
                spread(kernel, "ms"),
                number(kernel.get("graph_ms")),
                number(own.get("torch", {}).get("ms")),
                number(official.get("ms")),
                *beside,
                official.get("what") or NONE,
                percent(kernel.get("of_floor")),
                _memory(kernel, official),
            ]
        )
    return lines


def scale_table(rows: Sequence[Row]) -> Table:
    """A line for each point."""
    lines = [["model", "axis", "images", "batch", "method", "path", "first logits, ms", "peak GiB"]]
    for row in rows:
        about = [row["model"], row["axis"], str(row["images"]), str(row["batch"])]
        about += [row["method"], row["path"]]
        if "failed" in row:
            lines.append([*about, row["failed"], row.get("where", NONE)])
            continue
        lines.append([*about, spread(row, "ttft_ms"), gib(row.get("peak_memory_bytes"))])
    return lines


def _memory(kernel: Row, official: Row) -> str:
    if kernel.get("peak_bytes") is None:
        return NONE
    return f"{mib(kernel['peak_bytes'])} of {mib(official.get('peak_bytes'))}"


def _ratio(beside: Row, row: Row) -> float | None:
    if not row.get("meaningful") or "ms" not in row or "ms" not in beside:
        return None
    return float(beside["ms"] / row["ms"])


def _keep(keep: float | int | None) -> str:
    if keep is None:
        return "all"
    return str(keep) if isinstance(keep, int) else f"{keep:.1%} of layers"


def number(value: float | None) -> str:
    """Three digits that count."""
    if value is None:
        return NONE
    return f"{value:.3f}" if value < 1 else f"{value:.2f}" if value < 100 else f"{value:,.0f}"


def spread(row: Row, name: str) -> str:
    """Median (p20 to p80)."""
    if row.get(name) is None:
        return NONE
    return f"{number(row[name])} ({number(row[name + '_p20'])}–{number(row[name + '_p80'])})"


def times(value: float | None) -> str:
    """How many times as fast."""
    return NONE if value is None else f"{value:.2f}×"


def percent(value: float | None) -> str:
    """A share."""
    return NONE if value is None else f"{100 * value:.1f} %"


def gib(value: float | None) -> str:
    """Bytes in GiB."""
    return NONE if value is None else f"{value / 2**30:.1f}"


def mib(value: float | None) -> str:
    """Bytes in MiB."""
    return NONE if value is None else f"{value / 2**20:,.1f} MiB"
