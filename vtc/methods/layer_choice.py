"""Decoder layers chosen by a scorer and a selector, the same pair that chooses tokens."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace

import torch
from torch import Tensor

from vtc.errors import OptionError
from vtc.methods.base import Method
from vtc.selectors import FarthestPoint, MaxSum
from vtc.types import Budget, Selection, Tokens


def chosen_layers(
    method: Method, layers: Tokens, budget: Budget, signals: Mapping[str, Tensor]
) -> Selection:
    """The layers that a method's scorer and selector leave active.

    Args:
        method: its active scorer and selector decide.
        layers: one group of L tokens, the decoder layers.
        budget: the share of them.
        signals: what the method's own scorer reads, `float32[1, L]` each.

    Raises:
        OptionError: the selector looks at features, which layers have not.
    """
    selector, scorer = method.active_selector, method.active_scorer
    if isinstance(selector, MaxSum | FarthestPoint):
        raise OptionError(
            f"method {method.name!r} chooses among decoder layers and got selector "
            f"{selector.name!r}, which looks at features, expected one that looks at scores or "
            "places: 'top_k' or 'uniform'"
        )
    layers = replace(layers, signals={**layers.signals, **signals})
    scores = scorer(layers) if scorer is not None and selector.uses_scores else None
    return selector(layers, scores, budget.counts(layers.valid, layers.parent))


def needs_contribution(method: Method) -> bool:
    """Whether the choice looks at the contributions of layers."""
    scorer = method.active_scorer
    return (
        method.active_selector.uses_scores
        and scorer is not None
        and scorer.name == "layer_contribution"
    )


def checked_layers(name: str, layers: Iterable[int], depth: int) -> tuple[int, ...]:
    """Layers given by hand, ascending; raises `OptionError` where one does not exist."""
    found = tuple(sorted(set(layers)))
    if not found or found[0] < 0 or found[-1] >= depth:
        raise OptionError(
            f"method {name!r} got layers={found}, expected at least one, each in 0..{depth - 1}: "
            f"this language model has {depth} decoder layers"
        )
    return found


def contribution(values: tuple[float, ...]) -> dict[str, Tensor]:
    """The signal that `LayerContribution` reads."""
    return {"layer_contribution": torch.tensor([values], dtype=torch.float32)}


def check_named(name: str, signals: Mapping[str, Tensor], budget: Budget) -> None:
    """Refuse a budget that would skip layers which a published order does not name."""
    values = signals["layer_contribution"][0]
    depth, named = len(values), int(values.isfinite().sum())
    skipped = depth - budget.count(depth)
    if skipped > named:
        raise OptionError(
            f"method {name!r} is to skip {skipped} of {depth} layers, expected at most {named}: "
            f"the published order names no more; pass keep >= {(depth - named) / depth:.4g}, or a "
            "calibration of your own by `vtc calibrate`"
        )
