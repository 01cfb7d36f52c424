"""Information flow (FlowCut): attention, likeness of values and size of values as one score."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from vtc import ops
from vtc.dispatch import accelerated
from vtc.scorers.base import Scorer
from vtc.sites import BlockView, LayerView
from vtc.types import Signal, Tokens

_TINY = torch.finfo(torch.float32).tiny


def flow_score(a: Tensor, g: Tensor, m: Tensor) -> Tensor:
    """S = (a/Σa + g/Σg)·m over the last dimension.

    Args:
        a: `[..., N]`, attention to each patch.
        g: `[..., N]`, attention by likeness of values.
        m: `[..., N]`, size of each value.
    """
    return (_shares(a) + _shares(g)) * m


def drop_amount(p: Tensor, n: Tensor, target: Tensor, remaining: int) -> Tensor:
    """P = (n − T)/√rpl · (1 − R²) with R = H(p)/log n: how many of n go before the last cut.

    Args:
        p: `[R, N]`, attention to each patch, a distribution; 0 on padding.
        n: `[R]`, patches left.
        target: `[R]`, T, patches wanted in the end.
        remaining: rpl ≥ 1, blocks until the last cut.

    Returns:
        `float32[R]`, not rounded; it means nothing where n ≤ T.
    """
    entropy = -torch.xlogy(p, p).sum(-1)
    spread = entropy / n.clamp_min(2).log()
    return (n - target) / math.sqrt(remaining) * (1 - spread**2)


def units_left(
    p: Tensor,
    units: Tensor,
    targets: Tensor,
    remaining: int,
    patches: int,
    together: Tensor | None = None,
) -> Tensor:
    """How many units of each row go on: n − P, P rounded half to even, at least T; T if it is the
    last cut.

    Args:
        p: `[R, U·m]`, attention to each patch, a distribution; 0 on padding.
        units: `int64[R]`, n, units there are.
        targets: `int64[R]`, T, units wanted in the end.
        remaining: rpl, blocks until the last cut.
        patches: m, patches per unit.
        together: `int64[R]`, rows with the same number all drop the largest P among them; None:
            each its own.
    """
    if remaining:
        amount = drop_amount(p, units * patches, targets * patches, remaining)
        amount = torch.where(units > targets, amount / patches, 0).round().long()
        if together is not None:
            amount = torch.where(together[:, None] == together, amount, 0).amax(1)
        targets = torch.maximum(units - amount, targets)
    return torch.minimum(units, targets)


@accelerated
def flow_step(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    scale: float,
    valid: Tensor,
    before: Tensor | None,
    targets: Tensor | None,
    remaining: int,
    together: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """What one encoder block with a [CLS] adds to FlowCut's score, and which units go on.

    Args:
        query: `[R, H, 1, d]`, that of [CLS].
        key: `[R, H, 1 + U·m, d]`, that of [CLS] first; patches of a unit stand together.
        value: likewise.
        scale: what q·k is multiplied by.
        valid: `bool[R, U]`, the units that are left.
        before: `float32[R, U]`, the score so far; None: this block is the first.
        targets: `int64[R]` on the device, T; None: no cut after this block.
        remaining: rpl, blocks until the last cut.
        together: `int64[R]` on the device, see `units_left`.

    Returns:
        the score `float32[R, U]`, 0 where not valid, and `bool[R, U]`: of `valid`, what goes on.
    """
    patches = (key.shape[2] - 1) // max(valid.shape[1], 1)
    there = valid.repeat_interleave(patches, 1)
    _, p, score = _by_cls(query, key, value, scale, there)
    score = _by_unit(score, there, patches)
    if before is not None:
        score = (0.5 * before + 0.5 * score).masked_fill(~valid, 0)
    if targets is None:
        return score, valid
    counts = units_left(p, valid.sum(-1), targets, remaining, patches, together)
    return score, ops.topk_mask(score, valid, counts)


@dataclass(frozen=True)
class Flow(Scorer):
    """S of one encoder block, or of one decoder layer for the last token of its row.

    Only methods that look at queries, keys and values can give it: `block_tokens`, `layer_tokens`.
    """

    name: ClassVar[str] = "flow"

    @property
    def needs(self) -> tuple[Signal, ...]:
        """The score of one block or layer."""
        return (Signal("flow"),)

    def __call__(self, tokens: Tokens) -> Tensor:
        """Scores `float32[G, N]`."""
        return tokens.signal("flow")


def block_tokens(view: BlockView) -> tuple[Tensor, Tokens]:
    """The units of every row as tokens, with what one block says of them.

    Attention is that of [CLS], or of the mean query where there is none; it and the score of a unit
    are means over its patches. With a [CLS], its query and its value are compared with those of the
    patches, values without a scale and both softmaxes over [CLS] too. Without one, values count by
    their size alone.

    Returns:
        attention as a distribution over the row's patches, `float32[R, U·m]`, 0 on padding; and the
        tokens: `features [R, U, H·d]` are values, signals `"flow" [R, U]`, `"cls_row" [R, 1, U]`
        and `"image_key" [R]` where there is one.
    """
    patches = view.valid.repeat_interleave(view.patches, 1)
    value = view.value[:, :, int(view.has_cls) :]
    if view.has_cls:
        row, p, score = _by_cls(view.query[:, :, :1], view.key, view.value, view.scale, patches)
    else:
        row = p = ops.mean_query_row(view.query, view.key, view.scale, patches)
        score = p * _size(value)

    # values of one patch are one row, heads side by side
    features = value.transpose(1, 2).flatten(2)
    if view.patches > 1:
        features = features.unflatten(1, (view.valid.shape[1], view.patches)).mean(2)
    flow, rows = (_by_unit(x, patches, view.patches) for x in (score, row))
    signals = {"flow": flow, "cls_row": rows[:, None]}
    if view.image_key is not None:
        signals["image_key"] = view.image_key
    tokens = Tokens(
        features=features,
        valid=view.valid,
        grid=((1, 1, view.valid.shape[1]),) * len(view.valid),
        parent=torch.stack([view.image, torch.full_like(view.image, -1)], -1),
        signals=signals,
        seed=view.seed,
        index=view.index,
    )
    return p, tokens


def layer_tokens(view: LayerView) -> Tokens:
    """The visual tokens of every group with what the last entry of their row says of them.

    Both softmaxes run over the visual tokens of the group alone, scaled. `features [G, N, H·d]` are
    values, signals `"flow" [G, N]`, `"cls_row" [G, 1, N]`, the attention of that entry, and
    `"image_key" [G]` where there is one.
    """
    rows, past = view.parent[:, 1], view.key.shape[2] - view.query.shape[2]
    last = last_entry(view)[rows]
    places = rows[:, None], slice(None), view.columns + past
    key, value = (x[places].transpose(1, 2) for x in (view.key, view.value))  # [G, H, N, d]
    query = view.query[rows, :, last][:, :, None]
    value_last = view.value[rows, :, last + past][:, :, None]
    a = ops.attention_rows(query, key, view.scale, view.valid)[:, 0]
    g = ops.attention_rows(value_last, value, view.scale, view.valid)[:, 0]
    score = flow_score(a, g, _size(value)).masked_fill(~view.valid, 0)
    signals = {"flow": score, "cls_row": a.masked_fill(~view.valid, 0)[:, None]}
    return view.as_tokens(value.transpose(1, 2).flatten(2), signals)


def last_entry(view: LayerView) -> Tensor:
    """The last real entry of each row, `int64[B]`."""
    place = torch.arange(view.mask.shape[1], device=view.mask.device)
    return (place * view.mask).amax(-1)


def _by_cls(
    query: Tensor, key: Tensor, value: Tensor, scale: float, patches: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Attention of [CLS] `[R, N]`, the same as a distribution, and S."""
    there = torch.cat([patches.new_ones(len(patches), 1), patches], 1)
    row = ops.attention_rows(query, key, scale, there)[:, 0, 1:]
    g = ops.attention_rows(value[:, :, :1], value, 1.0, there)[:, 0, 1:]
    return row, _shares(row), flow_score(row, g, _size(value[:, :, 1:]))


def _by_unit(x: Tensor, patches: Tensor, m: int) -> Tensor:
    """Numbers of patches `[R, U·m]` as means over units `[R, U]`, 0 on padding."""
    x = x.masked_fill(~patches, 0)
    return x if m == 1 else x.unflatten(1, (-1, m)).mean(-1)


def _shares(x: Tensor) -> Tensor:
    return x / x.sum(-1, keepdim=True).clamp_min(_TINY)


def _size(value: Tensor) -> Tensor:
    """L1 norm of the head-averaged value, `[R, H, N, d]` to `float32[R, N]`."""
    return value.float().mean(1).abs().sum(-1)
