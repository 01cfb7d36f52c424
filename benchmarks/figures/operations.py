"""Time of each kernel beside plain torch, the official way and the floor."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

from figures.style import Row, legend_below, machine, paper, plain, saved, titled

_STYLES = {
    "triton": ("#0072B2", "o", "kernel"),
    "torch": ("#777777", "s", "plain torch"),
    "compile": ("#009E73", "D", "torch.compile"),
    "official": ("#D55E00", "^", "official way"),
}


def kernel_plot(rows: Sequence[Row]) -> dict[str, bytes]:
    """A line for each operation and shape, on a log scale.

    Args:
        rows: of `kernel_times.py`.
    """
    cases = list(dict.fromkeys((row["op"], row["case"]) for row in rows))
    figure = paper(11, 0.3 * len(cases) + 2.2)
    axes = figure.subplots()
    for y, (op, case) in enumerate(cases):
        own = {r["provider"]: r for r in rows if (r["op"], r["case"]) == (op, case) and "ms" in r}
        times = [row["ms"] for row in own.values()]
        if not times:
            continue
        floor = next(iter(own.values()))["floor_ms"]
        axes.plot([min([*times, floor]), max(times)], [y, y], color="#DDDDDD", lw=1.2, zorder=1)
        axes.plot(floor, y, marker="|", ms=13, mew=2, color="black", ls="", label="floor")
        for provider, row in own.items():
            _point(axes, y, provider, row)
    axes.set_xscale("log")
    axes.set_yticks(range(len(cases)), [f"{op}  {case}" for op, case in cases], fontsize=8.5)
    axes.invert_yaxis()
    axes.set_ylim(len(cases) - 0.4, -0.6)
    axes.set_xlabel("ms on the device (median, p20 to p80), log scale")
    plain(axes)
    for before, after in itertools.pairwise(cases):
        if before[0] != after[0]:
            axes.axhline(cases.index(after) - 0.5, color="#BBBBBB", lw=0.7)
    legend_below(figure, [axes], 5)
    what = "Kernels, and how the same is done without them"
    titled(figure, what, machine(rows[0], "bfloat16"))
    return saved(figure)


def _point(axes: Any, y: int, provider: str, row: Row) -> None:
    color, marker, label = _STYLES[provider]
    low, high = row["ms"] - row["ms_p20"], row["ms_p80"] - row["ms"]
    axes.errorbar(
        row["ms"],
        y,
        xerr=[[max(0.0, low)], [max(0.0, high)]],
        color=color,
        marker=marker,
        ms=6,
        ls="",
        elinewidth=1,
        capsize=2,
        label=label,
    )
