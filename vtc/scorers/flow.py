"""Information flow (FlowCut): attention, likeness of values and size of values as one score."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from vtc import ops
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
        there = torch.cat([patches.new_ones(len(patches), 1), patches], 1)
        row, g = (
            ops.attention_rows(q[:, :, :1], k, scale, there)[:, 0, 1:]
            for q, k, scale in (
                (view.query, view.key, view.scale),
                (view.value, view.value, 1.0),
            )
        )
        p, score = _shares(row), flow_score(row, g, _size(value))
    else:
        row = p = ops.mean_query_row(view.query, view.key, view.scale, patches)
        score = p * _size(value)

    def by_unit(x: Tensor) -> Tensor:
        return x.masked_fill(~patches, 0).view(*view.valid.shape, view.patches).mean(-1)

    # values of one patch are one row, heads side by side
    features = value.transpose(1, 2).flatten(2)
    if view.patches > 1:
        features = features.unflatten(1, (view.valid.shape[1], view.patches)).mean(2)
    signals = {"flow": by_unit(score), "cls_row": by_unit(row)[:, None]}
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
    if view.image_key is not None:
        signals["image_key"] = view.image_key
    return Tokens(
        features=value.transpose(1, 2).flatten(2),
        valid=view.valid,
        grid=((1, 1, view.valid.shape[1]),) * len(view.valid),
        parent=view.parent,
        signals=signals,
        seed=view.seed,
        index=view.index,
    )


def last_entry(view: LayerView) -> Tensor:
    """The last real entry of each row, `int64[B]`."""
    place = torch.arange(view.mask.shape[1], device=view.mask.device)
    return (place * view.mask).amax(-1)


def _shares(x: Tensor) -> Tensor:
    return x / x.sum(-1, keepdim=True).clamp_min(_TINY)


def _size(value: Tensor) -> Tensor:
    """L1 norm of the head-averaged value, `[R, H, N, d]` to `float32[R, N]`."""
    return value.float().mean(1).abs().sum(-1)
