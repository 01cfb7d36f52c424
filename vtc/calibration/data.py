"""A calibration as data: which layers matter to visual rows, where sinks show, which heads look."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from vtc.sites import Facts

FILE = "vtc_calibration.json"


@dataclass(frozen=True)
class Calibration:
    """What was found about one language model.

    Attributes:
        model: the folder or hub id it was measured on.
        layer_contribution: per decoder layer, KL(frozen ‖ normal) of the last prompt token's
            next-token distributions in nats, mean over samples, when visual rows are frozen in that
            layer (ShortV's LC score); None: not measured.
        sink_dims: dimensions of the residual stream in which attention sinks show; empty: none
            does. None: not measured.
        head_ratio: per decoder layer and head, the threshold below which YOPO's rule counts the
            head as one that reads visual tokens; None: not measured.
        samples: how many samples were looked at.
        source: what they were, or where the numbers were published.
    """

    model: str = ""
    layer_contribution: tuple[float, ...] | None = None
    sink_dims: tuple[int, ...] | None = None
    head_ratio: tuple[tuple[float, ...], ...] | None = None
    samples: int = 0
    source: str = ""


def calibration_of(given: Calibration | str | Path | None, facts: Facts, what: str) -> Calibration:
    """The calibration that holds `what` (the name of an attribute) for a model.

    Args:
        given: a calibration, its file, or a folder that holds one; None: what is published for this
            language model, else the file beside its weights.
        facts: of the model.
        what: `"layer_contribution"`, `"sink_dims"` or `"head_ratio"`.
    """
    raise NotImplementedError
