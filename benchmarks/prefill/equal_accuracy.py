"""Times at 7B of a method that skips work and of token dropping, where both were as accurate on the
testbed.

A sweep says what share of visual rows, averaged over decoder layers, leads to which accuracy on a
small trained model; the rows of `prefill_layers.py` say what that share costs in a large one.
Nothing says that accuracy at a share is the same there.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence
from typing import Any

Row = dict[str, Any]

# time depends on what is skipped and in how many layers, not on who chose them: by method and, if
# it has one that decides this, by an option
_OPTION = {"naavit": "skip_ffn", "ima_skip": "operator"}
_SKIPS = {
    ("shortv", None): "attention+ffn",
    ("naavit", None): "attention",
    ("naavit", False): "attention",
    ("naavit", True): "attention+ffn",
    ("ima_skip", None): "ffn",
    ("ima_skip", "ffn"): "ffn",
    ("ima_skip", "attention"): "attention",
    ("ima_skip", "block"): "attention+ffn",
}
_FULL = "none"
# work of another kind, which was not timed
_OTHERS = ("yopo", "sink_removal", "var")
# in the table for readers
BESIDE = ("vtc_cls", "uniform")


def skips(method: str, options: dict[str, Any]) -> str | None:
    """What visual rows skip in a method's layers; None: it is no such method."""
    return _SKIPS.get((method, options.get(_OPTION.get(method, ""))))


def share(row: Row) -> float | None:
    """Layer-averaged active visual tokens of a sweep's row over all; None: it does not say.

    Sweeps older than `active_fraction` say what tokens were kept, and of methods over layers what
    was asked for.
    """
    active = row.get("active_fraction")
    if active is None and skips(row["method"], row["options"]) is not None:
        try:
            return float(row["keep"])
        except (TypeError, ValueError):
            return None
    return row.get("kept_fraction") if active is None else float(active)


def time_at(points: Sequence[tuple[float, float]], where: float) -> tuple[float, bool] | None:
    """The time at a share, from measured (share, time), and whether it lies between two of them, on
    the line that joins them; None outside of what was measured."""
    known = sorted(points)
    shares = [x for x, _ in known]
    at = bisect_left(shares, where - 1e-6)
    if at == len(known):
        return None
    x, y = known[at]
    if x <= where + 1e-6:
        return y, False
    if at == 0:
        return None
    before, below = known[at - 1]
    return below + (y - below) * (where - before) / (x - before), True


def pairs(measured: Sequence[Row], summary: Sequence[Row]) -> list[Row]:
    """For each row of a method over layers, of each token-dropping method the budget with the
    nearest accuracy (of several, the smallest), and both prefill times at each size and batch.

    Times of token dropping are those of as many tokens dropped before the LLM; for a method that
    drops later they are looked up by its mean over layers.

    Args:
        measured: rows of `prefill_layers.py`.
        summary: rows of a sweep with seeds averaged.
    """
    found = []
    for row in summary:
        active = share(row)
        if skips(row["method"], row["options"]) is None or active is None:
            continue
        for label, rival in _rivals(row, summary).items():
            for size, batch in dict.fromkeys((r["size"], r["batch"]) for r in measured):
                own = [r for r in measured if (r["size"], r["batch"]) == (size, batch)]
                found.append(
                    {
                        "task": row["task"],
                        "size": size,
                        "batch": batch,
                        "method": row["label"],
                        "active_fraction": active,
                        "accuracy": row["accuracy"],
                        "beside": label,
                        "beside_active_fraction": share(rival),
                        "beside_accuracy": rival["accuracy"],
                        **_times(own, row, rival),
                    }
                )
    return found


def _rivals(row: Row, summary: Sequence[Row]) -> dict[str, Row]:
    """By label, the row of a token-dropping method nearest in accuracy; all tokens are a budget of
    each."""
    same = [other for other in summary if other["task"] == row["task"] and share(other)]
    full = [other for other in same if other["method"] == _FULL]
    chosen: dict[str, Row] = {}
    for label in dict.fromkeys(other["label"] for other in same if _drops(other)):
        own = [r for r in same if (r["label"], r["positions"]) == (label, row["positions"])]
        if own:
            chosen[label] = min(
                own + full, key=lambda r: (abs(r["accuracy"] - row["accuracy"]), share(r))
            )
    return chosen


def _drops(row: Row) -> bool:
    """Whether a row's method is one that drops visual tokens, and no composition."""
    method = row["method"]
    alone = not set("+@") & set(method)
    return alone and method not in (_FULL, *_OTHERS) and skips(method, row["options"]) is None


def _times(measured: Sequence[Row], row: Row, rival: Row) -> Row:
    """Both prefill times among the rows of one size and batch."""
    stock = [(1.0, r["prefill_ms"]) for r in measured if r["kind"] == "stock"]
    what = skips(row["method"], row["options"])
    skipping = [r for r in measured if r["skips"] == what]
    dropping = [r for r in measured if r["provider"] == "uniform"]
    found: Row = {"stock_prefill_ms": stock[0][1] if stock else None}
    for name, own, of in (("", skipping, row), ("beside_", dropping, rival)):
        at = share(of)
        points = [(r["active_fraction"], r["prefill_ms"]) for r in own]
        # where a method has a row at all layers, that is what it costs there
        points += [] if any(x == 1.0 for x, _ in points) else stock
        time = None if at is None else time_at(points, at)
        found[f"{name}prefill_ms"] = None if time is None else time[0]
        found[f"{name}between"] = None if time is None else time[1]
    return found


def markdown(found: Sequence[Row], beside: Sequence[str] = BESIDE) -> str:
    """The pairs as a table for each task, beside these labels; beside all if none of them is
    there."""
    shown = [pair for pair in found if pair["beside"] in beside] or list(found)
    if not shown:
        return "The sweep has no pair of a method over decoder layers and one that drops tokens.\n"
    cases = list(dict.fromkeys((pair["size"], pair["batch"]) for pair in shown))
    heads = [f"{size}, batch {batch}" for size, batch in cases]
    lines = []
    for task in dict.fromkeys(pair["task"] for pair in shown):
        lines += [
            f"`{task}`, and prefill in ms",
            "",
            f"| method | active | accuracy | beside | active | accuracy | {' | '.join(heads)} |",
            "|---" * (6 + len(cases)) + "|",
        ]
        own = [pair for pair in shown if pair["task"] == task]
        groups: dict[tuple[Any, ...], dict[tuple[str, int], Row]] = {}
        for pair in own:
            key = pair["method"], pair["active_fraction"], pair["accuracy"], pair["beside"]
            groups.setdefault(key, {})[pair["size"], pair["batch"]] = pair
        for by_case in groups.values():
            first = next(iter(by_case.values()))
            cells = [
                f"`{first['method']}`",
                *(f"{100 * first[name]:.1f} %" for name in ("active_fraction", "accuracy")),
                f"`{first['beside']}`",
                *(f"{100 * first[f'beside_{n}']:.1f} %" for n in ("active_fraction", "accuracy")),
                *(_both(by_case[case]) for case in cases),
            ]
            lines.append(f"| {' | '.join(cells)} |")
        lines.append("")
    lines.append("Active: visual tokens, averaged over decoder layers, over all. ~: on the line")
    lines.append("between two measured times; –: outside of what was measured.")
    return "\n".join(lines) + "\n"


def _both(pair: Row) -> str:
    mine, theirs = (
        "–"
        if pair[f"{name}prefill_ms"] is None
        else f"{'~' if pair[f'{name}between'] else ''}{pair[f'{name}prefill_ms']:.1f}"
        for name in ("", "beside_")
    )
    return f"{mine} against {theirs}"
