"""A picture of a `LayerPlan`: what visual rows do, and how they are read, in each decoder layer.

One column per layer, one row per part of a layer; a row in which every layer is as in the stock
model says nothing and is left out, but for attention and the feed-forward network.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from PIL import Image, ImageColor, ImageDraw, ImageFont
from torch import Tensor

from vtc.errors import InputError
from vtc.plans import LayerPlan, LayerRule

# Okabe and Ito's blue and orange; what is skipped or gone stands back
_ACTIVE, _SKIPPED, _READ = "#0072B2", "#E4E4E4", "#D55E00"
_WIDTH = 720
_CELL, _GAP, _BARS = 26, 3, 84
# scores that differ by more than this would leave bars that cannot be seen
_LINEAR = 30.0


@dataclass(frozen=True)
class _Cell:
    """One layer's part: how much of it is there (0 to 1), and a few letters about it."""

    share: float
    text: str = ""


def layer_chart(plan: LayerPlan, tokens: Sequence[float] | None = None) -> Image.Image:
    """Rows "attention" and "FFN" (blue: visual rows go through it), and what else the plan says.

    Above them, where layers were scored, a bar per layer, blue where it stays active. Below them
    the heads that read visual tokens, how many rows and columns away visual tokens see each other,
    how many of them text does not read, and how many entries count as sinks, over the batch.

    Args:
        plan: one of `handle.plans`.
        tokens: the share of visual tokens that are there in each layer, drawn if any are gone.

    Raises:
        InputError: `tokens` are not one number per layer.
    """
    depth = len(plan.rules)
    if tokens is not None and len(tokens) != depth:
        raise InputError(
            f"got tokens of {len(tokens)} layers and a plan over {depth}, expected one share for "
            "each layer of the plan"
        )
    rows = _rows(plan.rules, tokens)
    width = max(8, min(44, _WIDTH // depth))
    font, small = ImageFont.load_default(15), ImageFont.load_default(12)
    left = 16 + max(round(font.getlength(name)) for name in (*rows, "decoder layer", "score"))
    top = _BARS + 2 * _GAP if plan.scores is not None else _GAP
    size = left + depth * width + 12, top + len(rows) * (_CELL + _GAP) + 24
    sheet = Image.new("RGB", size, "white")
    draw = ImageDraw.Draw(sheet)
    if plan.scores is not None:
        _bars(draw, plan, left, width)
        middle = _BARS / 2
        draw.text((left - 8, middle), _scale(plan.scores), fill="black", font=font, anchor="rm")
    for i, (name, cells) in enumerate(rows.items()):
        y = top + i * (_CELL + _GAP)
        draw.text((left - 8, y + _CELL / 2), name, fill="black", font=font, anchor="rm")
        color = _ACTIVE if name in ("attention", "FFN") else _READ
        for layer, cell in enumerate(cells):
            x = left + layer * width
            box = (x, y, x + width - 2, y + _CELL - 1)
            draw.rectangle(box, fill=_blend(color, cell.share))
            if cell.text and small.getlength(cell.text) < width - 2:
                ink = "white" if cell.share > 0.6 else "black"
                middle_of = (x + width / 2 - 1, y + _CELL / 2)
                draw.text(middle_of, cell.text, fill=ink, font=small, anchor="mm")
    y = size[1] - 12
    draw.text((left - 8, y), "decoder layer", fill="black", font=font, anchor="rm")
    every = next(n for n in (1, 2, 4, 5, 10, 20) if n * width >= 22)
    for layer in range(0, depth, every):
        middle_of = (left + layer * width + width / 2 - 1, y)
        draw.text(middle_of, str(layer), fill="black", font=small, anchor="mm")
    return sheet


def _rows(rules: Sequence[LayerRule], tokens: Sequence[float] | None) -> dict[str, list[_Cell]]:
    rows = {
        "attention": [_Cell(float(rule.attention)) for rule in rules],
        "FFN": [_Cell(float(rule.ffn)) for rule in rules],
    }
    if any(rule.heads is not None for rule in rules):
        rows["heads that read"] = [_heads(rule.heads) for rule in rules]
    if any(rule.radius is not None for rule in rules):
        rows["visual sees within"] = [_radius(rule.radius) for rule in rules]
    for name, masks in (
        ("tokens not read", [rule.unread for rule in rules]),
        ("sinks", [rule.sinks for rule in rules]),
    ):
        if any(mask is not None for mask in masks):
            rows[name] = _counts(masks)
    if tokens is None or min(tokens) == 1:
        return rows
    # where no visual token is left, nothing is to be said about them
    rows = {
        name: [cell if n else _Cell(0.0) for cell, n in zip(cells, tokens, strict=True)]
        for name, cells in rows.items()
    }
    return rows | {"tokens there": [_Cell(n, f"{100 * n:.0f}%") for n in tokens]}


def _heads(heads: Tensor | None) -> _Cell:
    return _Cell(1.0, "all") if heads is None else _Cell(float(heads.float().mean()), _sum(heads))


def _radius(radius: int | None) -> _Cell:
    return _Cell(1.0, "all") if radius is None else _Cell(0.35, str(radius))


def _counts(masks: Sequence[Tensor | None]) -> list[_Cell]:
    """How many entries each mask holds; the largest is the darkest."""
    counts = [0 if mask is None else int(mask.sum()) for mask in masks]
    most = max(counts) or 1
    return [_Cell(n / most, str(n)) for n in counts]


def _sum(mask: Tensor) -> str:
    return str(int(mask.sum()))


def _bars(draw: ImageDraw.ImageDraw, plan: LayerPlan, left: int, width: int) -> None:
    """Scores as bars that stand on the rows below; blue in layers that stay active."""
    if plan.scores is None:
        return
    active = plan.active
    for layer, height in enumerate(_heights(plan.scores.tolist())):
        x = left + layer * width
        y = _BARS - max(2, round(height * (_BARS - 8)))
        color = _ACTIVE if active[layer] else "#9A9A9A"
        draw.rectangle((x, y, x + width - 2, _BARS - 1), fill=color)


def _heights(scores: Sequence[float]) -> list[float]:
    """Scores as numbers in [0, 1]; infinite ones, of layers that an order does not name, as 1."""
    finite = [s for s in scores if math.isfinite(s)]
    if not finite:
        return [float(s > 0) for s in scores]
    low, high = min(0.0, *finite), max(finite)
    if _logarithmic(scores):
        # zero has no logarithm: it stands where the lowest other would have no bar
        least, most = math.log(min(s for s in finite if s > 0)), math.log(high)
        low, high = least - 0.08 * (most - least), most
        scores = [math.log(s) if 0 < s < math.inf else s if s else low for s in scores]
    span = (high - low) or 1.0
    return [
        min(1.0, max(0.0, (s - low) / span)) if math.isfinite(s) else float(s > 0) for s in scores
    ]


def _logarithmic(scores: Sequence[float]) -> bool:
    """Whether some of the scores would be too low to see beside others, and none is negative."""
    positive = [s for s in scores if 0 < s < math.inf]
    return bool(positive) and min(scores) >= 0 and max(positive) / min(positive) > _LINEAR


def _scale(scores: Tensor) -> str:
    return "score (log)" if _logarithmic(scores.tolist()) else "score"


def _blend(color: str, share: float) -> tuple[int, int, int]:
    """The color of a cell: `share` of `color`, the rest that of what is skipped."""
    full, empty = ImageColor.getrgb(color), ImageColor.getrgb(_SKIPPED)
    mixed = [round(share * f + (1 - share) * e) for f, e in zip(full[:3], empty[:3], strict=True)]
    return mixed[0], mixed[1], mixed[2]
