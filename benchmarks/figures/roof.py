"""The roofline: what each part reaches of what the machine can do, by arithmetic intensity."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from figures.parts import chosen
from figures.style import GRAY, PARTS, Row, machine, paper, plain, saved, titled

_STYLES = {
    ("stock", "eager"): ("o", "none", "stock, eager"),
    ("stock", "fast"): ("o", "full", "stock, fast"),
    ("vtc_cls", "eager"): ("^", "none", "vtc_cls, eager"),
    ("vtc_cls", "fast"): ("^", "full", "vtc_cls, fast"),
    ("stock", "compile"): ("s", "full", "stock, compiled"),
    ("vtc_cls", "compile"): ("D", "full", "vtc_cls, compiled"),
}


def roof_plot(rows: Sequence[Row]) -> dict[str, bytes]:
    """A panel for each model: encoder, prefill and decode of stock and of `vtc_cls`.

    Args:
        rows: of `ttft.py`.
    """
    cases = chosen(rows)
    columns = min(3, len(cases))
    lines = -(-len(cases) // columns)
    figure = paper(5.2 * columns, 4.6 * lines + 1.2)
    grid = figure.subplots(lines, columns, squeeze=False, sharex=True, sharey=True).flatten()
    for axes, ((model, batch), own) in zip(grid, cases.items(), strict=False):
        prompts = "one prompt" if batch == 1 else f"{batch} prompts"
        axes.set_title(f"{model}, {prompts}", loc="left", fontsize=11)
        _roof(axes, own[0])
        for row in own:
            if (row["method"], row["path"]) in _STYLES:
                _points(axes, row)
        axes.set_xlabel("FLOPs per byte that must be moved")
        axes.tick_params(labelbottom=True)
        plain(axes)
    for axes in grid[::columns]:
        axes.set_ylabel("TFLOP/s reached")
    for empty in grid[len(cases) :]:
        empty.set_visible(False)
    _legend(figure, {(r["method"], r["path"]) for own in cases.values() for r in own})
    first = next(iter(cases.values()))[0]
    titled(
        figure,
        "How near each part comes to the roof of a measured copy and product",
        machine(first),
    )
    return saved(figure)


def _roof(axes: Any, row: Row) -> None:
    copy, matmul = row["ceiling_copy"], row["ceiling_matmul"]
    x = np.logspace(-0.5, 4.2, 100)
    axes.loglog(x, np.minimum(x * copy, matmul) / 1e12, color="black", lw=1.4)
    axes.text(
        0.97,
        0.04,
        f"{matmul / 1e12:,.0f} TFLOP/s, {copy / 1e12:.2f} TB/s",
        transform=axes.transAxes,
        ha="right",
        va="bottom",
        fontsize=8.5,
        color=GRAY,
    )


def _points(axes: Any, row: Row) -> None:
    marker, fill, _ = _STYLES[row["method"], row["path"]]
    times = {"encoder": row["encoder_ms"], "prefill": row["prefill_ms"]}
    times["decode"] = row.get("tpot_ms")
    for part, ms in times.items():
        if not ms or ms <= 0:
            continue
        moved, flops = row["work"][part]
        axes.plot(
            flops / moved,
            flops / ms / 1e9,
            marker=marker,
            ms=9,
            mew=1.6,
            color=PARTS[part],
            markerfacecolor=PARTS[part] if fill == "full" else "none",
            ls="",
        )


def _legend(figure: Any, shown: set[tuple[str, str]]) -> None:
    from matplotlib.lines import Line2D

    handles = [
        Line2D([], [], marker="s", ls="", color=PARTS[part], ms=9, label=part)
        for part in ("encoder", "prefill", "decode")
    ]
    handles += [
        Line2D(
            [],
            [],
            marker=marker,
            ls="",
            color=GRAY,
            ms=9,
            markerfacecolor=GRAY if fill == "full" else "none",
            label=label,
        )
        for key, (marker, fill, label) in _STYLES.items()
        if key in shown
    ]
    figure.legend(handles=handles, loc="outside lower center", ncols=7, frameon=False, fontsize=9)
