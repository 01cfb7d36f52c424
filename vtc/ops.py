"""The tensor operations behind scorers, selectors and the runtime: a plain-torch reference each.

The reference is the specification and the CPU path. A Triton kernel that equals it may take its
place on a GPU; which one ran is said in `report()`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from vtc.errors import OptionError


def attention_rows(q: Tensor, k: Tensor, scale: float, valid: Tensor | None = None) -> Tensor:
    """Softmax attention of a few queries to all keys, averaged over heads; N×N is never formed.

    Args:
        q: `[B, H, R, d]`, the R query rows wanted (one for [CLS]).
        k: `[B, H, N, d]`.
        scale: what q·k is multiplied by.
        valid: `bool[B, N]`, keys that may be attended to; None: all.

    Returns:
        `float32[B, R, N]`; each row sums to 1 over the valid keys.
    """
    logits = torch.einsum("bhrd,bhnd->bhrn", q.float(), k.float()) * scale
    if valid is not None:
        logits = logits.masked_fill(~valid[:, None, None], float("-inf"))
    return logits.softmax(-1).mean(1)


def group_topk(scores: Tensor, valid: Tensor, counts: Tensor) -> tuple[Tensor, Tensor]:
    """The `counts[g]` highest scores of each group, as ascending indices; ties go to the lowest
    index.

    Args:
        scores: `[G, N]`.
        valid: `bool[G, N]`; an invalid token is never chosen.
        counts: `int64[G]` on the CPU, at most the valid tokens of the group.

    Returns:
        `keep`, `int64[G, K]` with K = max(counts), 0 where not valid, and `bool[G, K]`.
    """
    width = int(counts.max()) if len(counts) else 0
    by_score = scores.float().argsort(dim=-1, descending=True, stable=True)
    # a second stable sort puts invalid tokens last whatever their score, -inf included
    by_score = by_score.gather(1, (~valid).gather(1, by_score).int().argsort(dim=-1, stable=True))
    rank = torch.arange(width, device=scores.device)
    keep_valid = rank < counts.to(scores.device)[:, None]
    index = by_score[:, :width].masked_fill(~keep_valid, scores.shape[1])
    return index.sort(-1).values.masked_fill(~keep_valid, 0), keep_valid


def compact(x: Tensor, index: Tensor, valid: Tensor) -> Tensor:
    """Gather rows: `out[b, l] = x[b, index[b, l]]`, zeros where not valid.

    Args:
        x: `[B, S, ...]`.
        index: `int64[B, L]`.
        valid: `bool[B, L]`.

    Returns:
        `[B, L, ...]`, contiguous, in the dtype of `x`.
    """
    rows = torch.arange(len(x), device=x.device)[:, None]
    return x[rows, index].masked_fill(~valid.view(*valid.shape, *[1] * (x.dim() - 2)), 0)


def choose_backend(kernels: str) -> str:
    """Which implementation runs: `"torch"`; asking for Triton where there is no kernel is an
    error."""
    if kernels not in ("auto", "torch", "triton"):
        raise OptionError(f"kernels={kernels!r} is unknown; expected 'auto', 'torch' or 'triton'")
    if kernels == "triton":
        raise OptionError(
            "kernels='triton' was asked for, but this version has no Triton kernel for the "
            "operations used; pass kernels='auto'"
        )
    return "torch"
