"""Information flow (FlowCut): attention, likeness of values and size of values as one score.

Not a `Scorer`: these look at the queries, keys and values of one block or layer.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from vtc import ops
from vtc.sites import BlockView, LayerView

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


def block_flow(view: BlockView) -> tuple[Tensor, Tensor]:
    """Attention and score of every patch of every row, both `float32[R, U·m]`, 0 on padding.

    With a [CLS], its query and its value are compared with those of the patches, values without a
    scale and both softmaxes over [CLS] too. Without one, the mean query takes its place and values
    count by their size alone.

    Returns:
        p, attention as a distribution over the row's patches, and the score S.
    """
    patches = view.valid.repeat_interleave(view.patches, 1)
    if not view.has_cls:
        p = ops.mean_query_row(view.query, view.key, view.scale, patches)
        return p, (p * _size(view.value)).masked_fill(~patches, 0)
    there = torch.cat([patches.new_ones(len(patches), 1), patches], 1)
    a, g = (
        ops.attention_rows(q[:, :, :1], k, scale, there)[:, 0, 1:]
        for q, k, scale in ((view.query, view.key, view.scale), (view.value, view.value, 1.0))
    )
    score = flow_score(a, g, _size(view.value[:, :, 1:]))
    return _shares(a), score.masked_fill(~patches, 0)


def layer_flow(view: LayerView) -> Tensor:
    """Score of every visual token for the last entry of its row, `float32[G, N]`, 0 on padding.

    Both softmaxes run over the visual tokens of the group alone, scaled.
    """
    rows, past = view.parent[:, 1], view.key.shape[2] - view.query.shape[2]
    last = last_entry(view)[rows]
    places = rows[:, None], slice(None), view.columns + past
    key, value = (x[places].transpose(1, 2) for x in (view.key, view.value))  # [G, H, N, d]
    query = view.query[rows, :, last][:, :, None]
    value_last = view.value[rows, :, last + past][:, :, None]
    a = ops.attention_rows(query, key, view.scale, view.valid)[:, 0]
    g = ops.attention_rows(value_last, value, view.scale, view.valid)[:, 0]
    return flow_score(a, g, _size(value)).masked_fill(~view.valid, 0)


def last_entry(view: LayerView) -> Tensor:
    """The last real entry of each row, `int64[B]`."""
    place = torch.arange(view.mask.shape[1], device=view.mask.device)
    return (place * view.mask).amax(-1)


def _shares(x: Tensor) -> Tensor:
    return x / x.sum(-1, keepdim=True).clamp_min(_TINY)


def _size(value: Tensor) -> Tensor:
    """L1 norm of the head-averaged value, `[R, H, N, d]` to `float32[R, N]`."""
    return value.float().mean(1).abs().sum(-1)
