"""Colors, paper and ink that all pictures share."""

from __future__ import annotations

import io
from collections.abc import Sequence
from typing import Any

Row = dict[str, Any]

GRAY = "#555555"
# Okabe and Ito's palette: told apart with any color vision, and by brightness on gray paper
PARTS = {
    "encoder": "#0072B2",
    "score": "#E69F00",
    "select": "#D55E00",
    "gather": "#CC79A7",
    "selection": "#D55E00",
    "prefill": "#56B4E9",
    "decode": "#009E73",
}


def paper(width: float, height: float) -> Any:
    """An empty figure that needs no display."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def saved(figure: Any) -> dict[str, bytes]:
    """The files' contents by ending: `png` and `svg`; the same figure gives the same bytes."""
    import matplotlib

    out = {}
    for ending in ("png", "svg"):
        buffer = io.BytesIO()
        # no date and a fixed salt: the same rows give the same file
        metadata = {"Software": None} if ending == "png" else {"Date": None, "Creator": None}
        with matplotlib.rc_context({"svg.hashsalt": "vtc"}):
            figure.savefig(buffer, format=ending, dpi=150, metadata=metadata)
        out[ending] = buffer.getvalue()
    return out


def machine(row: Row, what: str = "bfloat16, sdpa, random weights") -> str:
    """Where a row was measured, and with what."""
    where = row["gpu"] or row["cpu"]
    toys = "" if row.get("meaningful", True) else "TOY SHAPES, times say nothing; "
    return (
        f"{toys}{where}, {what}; torch {row['torch']}, transformers {row['transformers']}; "
        f"{row['date']}, {row['commit']}"
    )


def titled(figure: Any, title: str, where: str) -> None:
    """What is seen, and below it where it was measured, in a strip above the panels."""
    height = figure.get_figheight()
    figure.get_layout_engine().set(rect=(0, 0, 1, 1 - 0.62 / height))
    figure.text(0.01, 1 - 0.1 / height, title, fontsize=13, weight="bold", va="top")
    figure.text(0.01, 1 - 0.38 / height, where, fontsize=9, color=GRAY, va="top")


def plain(axes: Any) -> None:
    """A light grid and two spines."""
    axes.grid(alpha=0.25, lw=0.6)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)


def legend_below(figure: Any, grid: Sequence[Any], columns: int) -> None:
    """One legend for all panels."""
    handles, labels = [], []
    for axes in grid:
        for handle, label in zip(*axes.get_legend_handles_labels(), strict=True):
            if label not in labels:
                handles.append(handle)
                labels.append(label)
    figure.legend(
        handles, labels, loc="outside lower center", ncols=columns, frameon=False, fontsize=9
    )
