"""Where attention sinks show: what `sink_removal`, `var` and the filter have in common."""

from __future__ import annotations

from torch import Tensor

from vtc import ops
from vtc.calibration.data import Calibration, calibration_of
from vtc.errors import OptionError
from vtc.sites import Facts
from vtc.types import scale_layer

# no sinks show in layers 0 and 1 of the 32 that VAR was published for
FIRST_LAYER, PUBLISHED_DEPTH = 2, 32


def first_layer(depth: int) -> int:
    """The first layer at whose input sinks are looked for."""
    return min(scale_layer(FIRST_LAYER, PUBLISHED_DEPTH, depth), depth - 1)


def sink_dims(
    given: tuple[int, ...] | None, calibration: Calibration | str | None, facts: Facts, name: str
) -> tuple[int, ...]:
    """The dimensions in which sinks show: those given, else calibrated, else published ones.

    Raises:
        OptionError: a dimension that the LLM does not have.
        SignalError: none are known for this model.
    """
    if given is None:
        return calibration_of(calibration, facts, "sink_dims").sink_dims or ()
    if not given or min(given) < 0 or max(given) >= facts.llm_width:
        raise OptionError(
            f"{name!r} got dims={given}, expected at least one, each in "
            f"0..{facts.llm_width - 1}: this language model has that width"
        )
    return given


def massive(hidden: Tensor, dims: tuple[int, ...]) -> Tensor:
    """The massive activation of every entry, `float32[B, S]`; 0 where no dimension has any."""
    if not dims:
        return hidden.new_zeros(hidden.shape[:-1], dtype=hidden.dtype).float()
    return ops.massive_activation(hidden, dims)
