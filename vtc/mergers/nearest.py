"""The most similar of some tokens, and means over those that chose the same one."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import normalize

# numbers in the largest map of similarities formed at once: 64 MiB of float32
_MAP = 2**24


def nearest(metric: Tensor, valid: Tensor, among: Tensor) -> Tensor:
    """For every token the one of highest cosine among some, `int64[G, N]`; ties go to the lowest
    index, and so does a group with none.

    Args:
        metric: `[G, N, D]`, what is compared.
        valid: `bool[G, N]`.
        among: `bool[G, N]`, the tokens to be found.
    """
    x = normalize(metric.float().masked_fill(~valid[..., None], 0), dim=-1)
    there = (among & valid)[:, None]
    found = [
        (part @ x.mT).masked_fill(~there, float("-inf")).argmax(-1)
        for part in x.split(max(1, _MAP // max(len(x) * x.shape[1], 1)), 1)
    ]
    return torch.cat(found, 1) if found else valid.long()


def means(owner: Tensor, members: Tensor, slots: int) -> Tensor:
    """The weight of each token in the mean over the members of its slot, `float32[G, N]`; 0 for
    tokens that are members of none.

    Args:
        owner: `int64[G, N]`, the slot of each token.
        members: `bool[G, N]`, those that are part of theirs.
        slots: S.
    """
    owner = owner.masked_fill(~members, slots)
    sizes = torch.zeros(len(owner), slots + 1, device=owner.device)
    sizes = sizes.scatter_add(1, owner, torch.ones_like(owner, dtype=torch.float32))
    return (1 / sizes.gather(1, owner)).masked_fill(~members, 0)
