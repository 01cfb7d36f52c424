"""What `handle.plot` draws of a call: the tokens that are left, and what layers do with them."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from PIL import Image

from vtc import viz
from vtc.plans import LayerPlan
from vtc.types import Selection

if TYPE_CHECKING:
    from vtc.runtime.session import Call


def picture(call: Call, remaining: list[Selection], image: Image.Image, group: int) -> Image.Image:
    """The picture with what is left of it; below it, if the call had one, the plan's chart.

    Where some of the image's tokens are sinks, or not read, and all are left, those are drawn
    instead.

    Args:
        call: the last one.
        remaining: what was left of its images, site by site.
        image: the picture of the group.
        group: which image of the call.
    """
    left = viz.last_left(remaining)
    drawn = viz.overlay(image, left, group)
    if not call.plans:
        return drawn
    plan, n = call.plans[0], left.lengths[group]
    title = f"{int(left.valid[group].sum())} of {n} visual tokens are left"
    counts = sink_layers(call, plan, group)
    if any(counts):
        drawn = viz.sink_map(image, left, counts, group)
        most, some = max(counts), sum(c > 0 for c in counts)
        said = "are not read" if any(r.unread is not None for r in plan.rules) else "are sinks"
        title = f"{some} of {n} visual tokens {said}, in up to {most} layers"
    chart = viz.layer_chart(plan, _shares(call, group, len(plan.rules)))
    return viz.one_below_other([drawn, chart], [title, "what the decoder layers do with them"])


def sink_layers(call: Call, plan: LayerPlan, group: int) -> list[int]:
    """In how many decoder layers each token of an image counts as a sink or is not read for one.

    Nothing is known where tokens were dropped: masks are over what a layer saw.
    """
    counts = torch.zeros(call.images.lengths[group], dtype=torch.long)
    if call.later or not call.selection.is_identity:
        return counts.tolist()
    row, columns = call.images.rows[group], call.images.columns[group, : len(counts)]
    for rule in plan.rules:
        mask = rule.sinks if rule.unread is None else rule.unread
        if mask is not None:
            counts += mask.cpu()[row, columns].long()
    return counts.tolist()


def _shares(call: Call, group: int, depth: int) -> list[float]:
    """The share of an image's tokens that are there in each decoder layer."""
    there, shares = int(call.selection.slots[group]), []
    for layer in range(depth):
        shares.append(there / call.images.lengths[group])
        if (later := call.later.get(layer)) is not None:
            there = int(later.slots[group])
    return shares
