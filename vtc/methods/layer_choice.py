"""Decoder layers chosen by a scorer and a selector, the same pair that chooses tokens."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from vtc.calibration.data import calibration_of
from vtc.errors import OptionError
from vtc.methods.base import Method
from vtc.plans import LayerPlan, LayerRule
from vtc.scorers import LayerContribution
from vtc.selectors import FarthestPoint, MaxSum
from vtc.sites import Facts
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
    return selector(layers, scores, budget.counts(layers.lengths, layers.parent))


def plan_by_contribution(
    method: Method, layers: Tokens, facts: Facts, budget: Budget, rule: LayerRule
) -> LayerPlan:
    """The plan of a method with options `layers` and `calibration`: the rule is in force in the
    layers given, else in those that its scorer and selector do not leave active.

    Raises:
        OptionError: a layer that does not exist, or a published order that names too few.
        SignalError: nothing is known of the layers of this model.
    """
    options: Any = method
    if options.layers is not None:
        skipped = checked_layers(method.name, options.layers, facts.llm_depth)
        return LayerPlan.skipping(skipped, facts.llm_depth, rule)
    signals: dict[str, Tensor] = {}
    scorer = method.active_scorer
    reads = method.active_selector.uses_scores and isinstance(scorer, LayerContribution)
    if reads:
        found = calibration_of(options.calibration, facts, "layer_contribution")
        values = torch.tensor([found.layer_contribution], dtype=torch.float32)
        check_named(method.name, values, budget)
        signals["layer_contribution"] = values
    return LayerPlan.of_active(chosen_layers(method, layers, budget, signals), rule)


def checked_layers(name: str, layers: Iterable[int], depth: int) -> tuple[int, ...]:
    """Layers given by hand, ascending; raises `OptionError` where one does not exist."""
    found = tuple(sorted(set(layers)))
    if not found or found[0] < 0 or found[-1] >= depth:
        raise OptionError(
            f"method {name!r} got layers={found}, expected at least one, each in 0..{depth - 1}: "
            f"this language model has {depth} decoder layers"
        )
    return found


def check_named(name: str, contribution: Tensor, budget: Budget) -> None:
    """Refuse a budget that would skip layers which a published order does not name."""
    depth, named = contribution.shape[1], int(contribution.isfinite().sum())
    skipped = depth - budget.count(depth)
    if skipped > named:
        raise OptionError(
            f"method {name!r} is to skip {skipped} of {depth} layers, expected at most {named}: "
            f"the published order names no more; pass keep >= {(depth - named) / depth:.4g}, or a "
            "calibration of your own by `vtc calibrate`"
        )
