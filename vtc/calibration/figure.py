"""A calibration as a picture: what each layer contributes, how large activations grow, which heads
read visual tokens."""

from __future__ import annotations

import io
import math
from typing import Any

from vtc.calibration.activations import Activations
from vtc.calibration.data import Calibration

# Okabe and Ito's palette, as in the reports of sweeps
_BLUE, _RED, _GRAY = "#0072B2", "#D55E00", "#777777"


def picture(calibration: Calibration, title: str = "") -> bytes:
    """A PNG with a panel for each thing that was measured.

    Args:
        calibration: with at least one of them.
        title: above the panels; by default model and samples.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    drawing = [
        draw
        for draw, value in (
            (_layers, calibration.layer_contribution),
            (_activations, calibration.activations),
            (_heads, calibration.head_ratio),
        )
        if value is not None
    ]
    # a figure of its own, not pyplot's: nothing global changes in the caller's process
    figure = Figure(figsize=(5.4 * max(len(drawing), 1), 4.2), layout="constrained")
    FigureCanvasAgg(figure)
    for i, draw in enumerate(drawing):
        draw(figure.add_subplot(1, len(drawing), i + 1), calibration)
    figure.suptitle(title or f"{calibration.model}: {calibration.source}", fontsize=11)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=160, metadata={"Software": None})
    return buffer.getvalue()


def _layers(axes: Any, calibration: Calibration) -> None:
    scores = [v if math.isfinite(v) else math.nan for v in calibration.layer_contribution or ()]
    errors = calibration.contribution_error
    places = range(len(scores))
    axes.bar(places, scores, color=_BLUE, width=0.72)
    positive = [v for v in scores if v > 0]
    if positive:
        # scores of one model span several powers of ten
        axes.set_yscale("log")
        floor = 10 ** math.floor(math.log10(min(positive)) - 0.3)
        highest = max(v + e for v, e in zip(scores, errors or scores, strict=True) if v > 0)
        axes.set_ylim(floor, 2 * highest)
        for i, value in enumerate(scores):
            if value == 0:
                axes.annotate("0", (i, floor), (0, 2), textcoords="offset points", ha="center")
    if errors is not None:
        # a lower end at or below 0 has no place on a logarithmic axis
        below = [min(e, 0.98 * v) if v > 0 else 0.0 for e, v in zip(errors, scores, strict=True)]
        axes.errorbar(
            places,
            scores,
            yerr=(below, errors),
            fmt="none",
            ecolor="black",
            elinewidth=1,
            capsize=2,
        )
    axes.set_ylabel("KL(frozen ‖ normal) of the next token, nats")
    _frame(axes, "What visual rows gain in a layer (LC)", len(scores))


def _activations(axes: Any, calibration: Calibration) -> None:
    found = calibration.activations
    if not isinstance(found, Activations):
        return
    for values, dims, label, color, marker, above in (
        (found.first, found.first_dim, "first token", _BLUE, "o", -14),
        (found.text, found.text_dim, "other text tokens", _GRAY, "s", 7),
        (found.visual, found.visual_dim, "visual tokens", _RED, "^", 7),
    ):
        axes.plot(range(len(values)), values, color=color, marker=marker, ms=5, label=label)
        layer = max(range(len(values)), key=values.__getitem__)
        axes.annotate(
            f"dimension {dims[layer]}",
            (layer, values[layer]),
            (0, above),
            textcoords="offset points",
            color=color,
            fontsize=8,
            ha="right" if layer > len(values) / 2 else "left",
        )
    axes.axhline(found.tau, color="black", lw=1, ls=(0, (6, 2)), label=f"tau = {found.tau:g}")
    axes.set_ylim(0, 1.3 * max(found.tau, *found.first, *found.text, *found.visual))
    axes.set_ylabel("largest |x| / RMS(x) of a dimension")
    axes.legend(fontsize=8, frameon=False, ncols=2, loc="upper left")
    sinks = ", ".join(map(str, calibration.sink_dims or ()))
    shown = f"sink dimensions {sinks}" if sinks else "no sink dimension"
    _frame(axes, f"Largest activation per layer, {shown}", len(found.first))


def _heads(axes: Any, calibration: Calibration) -> None:
    from matplotlib.colors import LogNorm

    # a map of heads over layers, first layer at the bottom
    ratios = [[max(v, 1e-6) for v in row] for row in calibration.head_ratio or ()]
    finite = [v for row in ratios for v in row if math.isfinite(v)]
    norm = LogNorm(min(finite, default=0.1), max(finite, default=10.0))
    shown = axes.imshow(ratios, norm=norm, cmap="viridis", aspect="auto", origin="lower")
    bar = axes.figure.colorbar(shown, ax=axes, pad=0.02)
    bar.set_label("attention to visual / to text keys")
    axes.set_xlabel("head")
    axes.set_ylabel("decoder layer")
    axes.set_title("Which heads read visual tokens", loc="left", fontsize=10)
    _whole_ticks(axes.xaxis, len(ratios[0]))
    _whole_ticks(axes.yaxis, len(ratios))


def _frame(axes: Any, title: str, layers: int) -> None:
    axes.set_xlabel("decoder layer")
    axes.set_title(title, loc="left", fontsize=10)
    axes.grid(axis="y", alpha=0.25, lw=0.6)
    axes.set_axisbelow(True)
    axes.set_xlim(-0.6, layers - 0.4)
    _whole_ticks(axes.xaxis, layers)
    axes.spines[["top", "right"]].set_visible(False)


def _whole_ticks(axis: Any, count: int) -> None:
    step = max(1, round(count / 10))
    axis.set_ticks(range(0, count, step))
