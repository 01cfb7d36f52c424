"""How the operations are done elsewhere: the official implementations' way, in the model's
dtype."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence


def full_map(q: Tensor, k: Tensor, scale: float, causal: bool = False) -> Tensor:
    """What `output_attentions=True` makes, `[B, H, N, N]`: softmax in float32, kept in the model's
    dtype (transformers' eager attention)."""
    logits = q @ k.transpose(-1, -2) * scale
    if causal:
        later = torch.ones(logits.shape[-2:], dtype=torch.bool, device=q.device).triu(1)
        logits = logits.masked_fill(later, float("-inf"))
    return logits.softmax(-1, dtype=torch.float32).to(q.dtype)


def map_rows(q: Tensor, k: Tensor, scale: float, rows: int) -> Tensor:
    """The first rows of the full map, averaged over heads."""
    return full_map(q, k, scale)[:, :, :rows].mean(1)


def map_received(q: Tensor, k: Tensor, scale: float) -> Tensor:
    """The full map averaged over heads, then over queries."""
    return full_map(q, k, scale).mean(1).mean(1)


def map_mass(q: Tensor, k: Tensor, scale: float, rows: Tensor, onto: Tensor) -> Tensor:
    """The full causal map averaged over heads, then the sum from some entries to others, averaged
    over the former."""
    shares = full_map(q, k, scale, causal=True).mean(1)
    mass = shares.masked_fill(~onto[:, None], 0).sum(-1).masked_fill(~rows, 0)
    return mass.sum(-1) / rows.sum(-1)


def greedy_loop(
    features: Tensor, count: int, pivot: Tensor, objective: Literal["max_sum", "k_center"]
) -> Tensor:
    """A Python loop over the tokens to choose, image by image (k-center as in core-set code)."""
    found = []
    for x, first in zip(torch.nn.functional.normalize(features, dim=-1), pivot, strict=True):
        chosen, like = [first], x @ x[first]
        for _ in range(count - 1):
            like[chosen[-1]] = float("inf")
            chosen.append(like.argmin())
            row = x @ x[chosen[-1]]
            like = torch.maximum(like, row) if objective == "k_center" else like + row
        found.append(torch.stack(chosen).sort().values)
    return torch.stack(found)


def map_loop(kernel: Tensor, count: int) -> Tensor:
    """The loop of CDPruner's official code over all images at once."""
    batch, n, _ = kernel.shape
    rows = torch.arange(batch, device=kernel.device)
    factor = kernel.new_zeros(count, batch, n)
    left = kernel.diagonal(dim1=-2, dim2=-1).clone()
    chosen = []
    for i in range(count):
        j = left.argmax(-1)
        known = torch.einsum("tb,tbn->bn", factor[:i, rows, j], factor[:i])
        row = (kernel[rows, j] - known) / left[rows, j].sqrt()[:, None]
        factor[i] = row
        left = left - row.square()
        left[rows, j] = float("-inf")
        chosen.append(j)
    return torch.stack(chosen, -1).sort().values


def topk_loop(scores: Tensor, counts: list[int]) -> Tensor:
    """Top-k image by image, sorted and padded."""
    parts = [row.topk(k).indices.sort().values for row, k in zip(scores, counts, strict=True)]
    return pad_sequence(parts, batch_first=True)


def gather(x: Tensor, kept: Tensor, start: int, visual: int) -> Tensor:
    """Index arithmetic from kept visual tokens, then `torch.gather`."""
    batch, length, width = x.shape
    before = torch.arange(start, device=x.device).expand(batch, -1)
    behind = torch.arange(start + visual, length, device=x.device).expand(batch, -1)
    index = torch.cat([before, kept + start, behind], 1)
    return torch.gather(x, 1, index[..., None].expand(-1, -1, width))


def nonzero_loop(used: Tensor) -> Tensor:
    """`nonzero` row by row, padded at the left."""
    parts = [row.nonzero()[:, 0] for row in used]
    return pad_sequence(parts, batch_first=True, padding_side="left")


def index_add(x: Tensor, slot: Tensor, token: Tensor, weight: Tensor, slots: int) -> Tensor:
    """`index_add_` of weighted rows in the model's dtype."""
    groups, _, width = x.shape
    group = torch.arange(groups, device=x.device)[:, None]
    rows = x[group, token] * weight[..., None].to(x.dtype)
    out = x.new_zeros(groups * slots, width)
    out.index_add_(0, (group * slots + slot).flatten(), rows.flatten(0, 1))
    return out.view(groups, slots, width)
