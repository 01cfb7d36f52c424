"""The curve of a method on the testbed, drawn from the tables in benchmarks/results."""

from __future__ import annotations

import io
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure

from vtc.testbed import FAMILIES

BASELINES = {"random": "#888888", "uniform": "#b5a26a", "downsample": "#c98c8c"}
COLORS = ("#00796b", "#ef6c00", "#5e35b1", "#1565c0", "#ad1457", "#558b2f")
# ids that are svg's own would differ from build to build
STYLE = {"svg.fonttype": "none", "svg.hashsalt": "vtc", "font.size": 9}


@dataclass(frozen=True)
class Curve:
    """What is known of a method.

    Attributes:
        svg: its accuracy against what it keeps, one panel per model.
        tables: the files that it was drawn from.
        active: whether the x-axis counts active rows over layers, not tokens.
    """

    svg: str
    tables: tuple[str, ...]
    active: bool


def curve(name: str, active: bool, root: Path) -> Curve | None:
    """The curve of method `name`, or None where no table has it."""
    found = dict(_tables(name, active, root))
    if not found:
        return None
    x = "active_fraction" if active else "kept_fraction"
    with matplotlib.rc_context(STYLE):
        # not by pyplot: nothing is shown, and nothing is to be closed
        figure = Figure(figsize=(2.2 + 2.6 * len(found), 3.1), layout="constrained")
        panels = figure.subplots(1, len(found), sharey=True, squeeze=False)[0]
        for axes, (family, (_, rows)) in zip(panels, found.items(), strict=True):
            _panel(axes, family, name, rows, x)
        panels[0].set_ylabel("accuracy")
        figure.supxlabel(
            "visual rows that are active, averaged over layers" if active else "visual tokens kept",
            fontsize=9,
        )
        # one legend: panels have the same labels but where a table has more
        drawn: dict[str, Any] = {}
        for axes in panels:
            lines, labels = axes.get_legend_handles_labels()
            drawn |= dict(zip(labels, lines, strict=True))
        figure.legend(drawn.values(), drawn.keys(), loc="outside right center", frameon=False)
        buffer = io.StringIO()
        FigureCanvasSVG(figure).print_svg(buffer, metadata={"Date": None, "Creator": None})
    sources = dict.fromkeys(str(path.relative_to(root)) for path, _ in found.values())
    return Curve(buffer.getvalue(), tuple(sources), active)


def _tables(
    name: str, active: bool, root: Path
) -> Iterator[tuple[str, tuple[Path, list[dict[str, Any]]]]]:
    """For each family, the table with most rows of the method, and all its rows of that family."""
    paths = sorted((root / "benchmarks" / "results").glob("testbed_*/table.json"))
    tables = [(path, json.loads(path.read_text()).get("summary", [])) for path in paths]
    x = "active_fraction" if active else "kept_fraction"
    for family in FAMILIES:
        best: tuple[int, Path, list[dict[str, Any]]] = (0, Path(), [])
        for path, rows in tables:
            rows = [r for r in rows if _usable(r, x) and _family(r, path) == family]
            points = sum(r["method"] == name and "@" not in r["label"] for r in rows)
            # a single budget is no curve, but where a method has none it is all there is
            if points > best[0]:
                best = (points, path, rows)
        if best[0]:
            yield family, best[1:]


def _usable(row: dict[str, Any], x: str) -> bool:
    return row["positions"] == "keep" and row.get(x) is not None and row["accuracy"] is not None


def _family(row: dict[str, Any], path: Path) -> str:
    """Of a table of several models, the row's; of one of a single model, the folder's."""
    return str(row.get("model") or path.parent.name.removeprefix("testbed_").removeprefix("rows_"))


def _panel(axes: Axes, family: str, name: str, rows: list[dict[str, Any]], x: str) -> None:
    full = [r["accuracy"] for r in rows if r["method"] == "none"]
    if full:
        axes.axhline(full[0], color="#444444", linestyle=":", linewidth=1, label="all tokens")
    for baseline, color in BASELINES.items():
        points = [r for r in rows if r["label"] == baseline]
        if baseline != name and points:
            _line(axes, points, x, color=color, linestyle="--", label=baseline)
    own = [r for r in rows if r["method"] == name and "@" not in r["label"]]
    for color, label in zip(COLORS, dict.fromkeys(r["label"] for r in own), strict=False):
        points = sorted((r for r in own if r["label"] == label), key=lambda r: r[x])
        _line(axes, points, x, color=color, linestyle="-", label=label.replace(":", "\n"))
        axes.fill_between(
            [r[x] for r in points],
            [r["accuracy_low"] for r in points],
            [r["accuracy_high"] for r in points],
            color=color,
            alpha=0.15,
            linewidth=0,
        )
    axes.set(title=family, xscale="log", ylim=(0, 1.04), xlim=(0.035, 1.2))
    axes.set_xticks([0.05, 0.1, 0.2, 0.5, 1.0], ["5 %", "10 %", "20 %", "50 %", "all"], minor=False)
    axes.set_xticks([], minor=True)
    axes.yaxis.set_major_formatter(lambda y, _: f"{100 * y:.0f} %")
    axes.spines[["top", "right"]].set_visible(False)


def _line(axes: Axes, points: list[dict[str, Any]], x: str, **style: Any) -> None:
    points = sorted(points, key=lambda r: r[x])
    axes.plot(
        [r[x] for r in points],
        [r["accuracy"] for r in points],
        marker="o",
        markersize=3,
        linewidth=1.4,
        **style,
    )
