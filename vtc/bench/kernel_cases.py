"""The operations and the shapes they are measured at: those of a 7B model's prompts.

Letters: as in CONTRIBUTING; d is the size of a head.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor

from vtc.bench import kernel_ways as ways
from vtc.bench.ceilings import Work

Objective = Literal["max_sum", "k_center"]

# attention weights fall off like this: logits with the spread that trained towers' have
_SPREAD = 2.0


@dataclass
class Given:
    """What one case runs on.

    Attributes:
        args: of the operation.
        official: the official implementations' way, of the tensors it is given.
        work: the least that has to be moved and computed.
    """

    args: tuple[Any, ...]
    official: partial[Any]
    work: Work


@dataclass(frozen=True)
class Case:
    """An operation at a shape.

    Attributes:
        op: name in `vtc.ops`.
        name: what the shape is.
        official: what the official way is.
        make: inputs on a device.
        loops: whether the reference is a Python loop over kept tokens.
    """

    op: str
    name: str
    official: str
    make: Callable[[torch.device], Given]
    loops: bool = False


def _normal(device: torch.device, *shape: int) -> Tensor:
    generator = torch.Generator(device).manual_seed(0)
    return torch.randn(shape, generator=generator, device=device)


def _low(x: Tensor) -> Tensor:
    """In bfloat16; on a CPU, where Triton's interpreter takes bfloat16 for integers, in float32."""
    return x.to(torch.bfloat16 if x.is_cuda else torch.float32)


def _heads(device: torch.device, b: int, h: int, n: int, d: int) -> tuple[Tensor, Tensor]:
    """q and k `[B, H, N, d]`, laid out as projections leave them."""
    q, k = _low(_normal(device, 2, b, n, h, d).mul_(_SPREAD**0.5)).transpose(2, 3)
    return q, k


def rows(b: int, h: int, n: int, d: int, device: torch.device) -> Given:
    """One query row against all keys."""
    q, k = _heads(device, b, h, n, d)
    scale = d**-0.5
    work = Work(2 * b * h * (n + 1) * d + 4 * b * n, 2 * b * h * n * d)
    return Given((q[:, :, :1], k, scale), partial(ways.map_rows, q, k, scale, 1), work)


def received(b: int, h: int, n: int, d: int, device: torch.device) -> Given:
    """All queries; without the map the products are needed twice: for the sums, for the columns."""
    q, k = _heads(device, b, h, n, d)
    valid = torch.ones(b, n, dtype=torch.bool, device=device)
    scale = d**-0.5
    work = Work(4 * b * h * n * d + 5 * b * n, 4 * b * h * n * n * d)
    return Given((q, k, scale, valid), partial(ways.map_received, q, k, scale), work)


def mass(b: int, h: int, n: int, text: int, d: int, device: torch.device) -> Given:
    """The last entries onto those between them and the first 35, as text behind an image."""
    q, k = _heads(device, b, h, n, d)
    at, scale = torch.arange(n, device=device).expand(b, -1), d**-0.5
    rows, onto = at >= n - text, (at >= min(35, n // 4)) & (at < n - text)
    given = (q, k, scale, torch.ones_like(rows), rows, onto)
    work = Work(2 * b * h * (n + text) * d + 3 * b * n, 2 * b * h * text * n * d)
    return Given(given, partial(ways.map_mass, q, k, scale, rows, onto), work)


def diverse(objective: Objective, g: int, n: int, keep: int, d: int, device: torch.device) -> Given:
    """Features read once, inner products with the chosen."""
    features = _low(_normal(device, g, n, d))
    valid = torch.ones(g, n, dtype=torch.bool, device=device)
    counts = torch.full((g,), keep)
    pivot = torch.arange(g, device=device) * (n // g)
    args = (features, valid, counts, pivot, objective)
    work = Work(2 * g * n * d + 9 * g * keep, 2 * g * n * keep * d)
    return Given(args, partial(ways.greedy_loop, features, keep, pivot, objective), work)


def determinant(g: int, n: int, keep: int, d: int, device: torch.device) -> Given:
    """Similarity times relevance on both sides."""
    x = torch.nn.functional.normalize(_normal(device, g, n, d), dim=-1)
    relevance = _normal(device, g, n).sigmoid()
    kernel = relevance[..., None] * (x @ x.transpose(1, 2)) * relevance[:, None]
    valid = torch.ones(g, n, dtype=torch.bool, device=device)
    work = Work(4 * g * n * (keep + 1) + 9 * g * keep, g * n * keep**2)
    args = (kernel, valid, torch.full((g,), keep))
    return Given(args, partial(ways.map_loop, kernel, keep), work)


def topk(g: int, n: int, keep: int, device: torch.device) -> Given:
    """Ragged counts, scores with ties."""
    scores = (_normal(device, g, n) * 32).round()
    valid = torch.ones(g, n, dtype=torch.bool, device=device)
    counts = [keep - i % 3 for i in range(g)]
    work = Work(5 * g * n + 9 * g * keep)
    given = (scores, valid, torch.tensor(counts))
    return Given(given, partial(ways.topk_loop, scores, counts), work)


def gathered(b: int, n: int, keep: int, d: int, device: torch.device) -> Given:
    """35 entries of text, N visual tokens of which some stay, 29 entries of text."""
    start, behind = 35, 29
    x = _low(_normal(device, b, start + n + behind, d))
    kept = _normal(device, b, n).topk(keep).indices.sort().values
    text = [torch.arange(start, device=device), torch.arange(start + n, x.shape[1], device=device)]
    index = torch.cat([text[0].expand(b, -1), kept + start, text[1].expand(b, -1)], 1)
    valid = torch.ones_like(index, dtype=torch.bool)
    work = Work(4 * index.numel() * d + 9 * index.numel())
    return Given((x, index, valid), partial(ways.gather, x, kept, start, n), work)


def packed(b: int, length: int, width: int, device: torch.device) -> Given:
    """Where a mask is set, against the right edge."""
    order = _normal(device, b, length).argsort(-1).argsort(-1)
    used = order < width - torch.arange(b, device=device)[:, None] % 3
    return Given((used, width), partial(ways.nonzero_loop, used), Work(b * length + 9 * b * width))


def merged(g: int, n: int, keep: int, d: int, device: torch.device) -> Given:
    """Every token goes into one of the kept slots, the mean of its members."""
    x = _low(_normal(device, g, n, d))
    slot = (_normal(device, g, n).argsort(-1) % keep).contiguous()
    token = torch.arange(n, device=device).expand(g, -1).contiguous()
    members = torch.zeros(g, keep, device=device).scatter_add_(
        1, slot, torch.ones_like(slot.float())
    )
    args = (x, slot, token, 1 / members.gather(1, slot), keep)
    work = Work(2 * g * (n + keep) * d + 20 * g * n, 2 * g * n * d)
    return Given(args, partial(ways.index_add, *args), work)


_MAP = "output_attentions: the full map"
_LOOP = "a Python loop over kept tokens"


def cases(tiny: bool = False) -> list[Case]:
    """What is measured; `tiny`: small shapes, to try the code."""
    return _tiny() if tiny else _real()


def _real() -> list[Case]:
    vit = {"ViT-L block, 1 image": (1, 16, 577, 64), "ViT-L block, 5 crops": (5, 16, 577, 64)}
    vit |= {
        "ViT-L block, 8 images": (8, 16, 577, 64),
        "InternViT block, 13 tiles": (13, 16, 1025, 64),
    }
    vit |= {"Qwen2.5-VL block, 5,184 patches": (1, 16, 5184, 80)}
    vit |= {"Llama layer, 2,944 entries": (1, 32, 2944, 128)}
    every = {"ViT-L block, 5 crops": (5, 16, 577, 64)}
    every |= {"Qwen2.5-VL block, 5,184 patches": (1, 16, 5184, 80)}
    every |= {"16,384 tokens, 16 heads": (1, 16, 16384, 64)}
    found = [Case("attention_rows", name, _MAP, partial(rows, *s)) for name, s in vit.items()]
    found += [
        Case("attention_received", name, _MAP, partial(received, *s)) for name, s in every.items()
    ]
    found += [
        Case(
            "causal_mass",
            f"Llama layer, {b} × {n:,} entries",
            _MAP,
            partial(mass, b, 32, n, 64, 128),
        )
        for b, n in [(1, 675), (8, 675), (1, 2979)]
    ]
    budgets = [(1, 576, 64), (1, 576, 192), (8, 576, 64), (1, 2880, 288), (1, 2880, 640)]
    objectives: tuple[Objective, ...] = ("k_center", "max_sum")
    found += [
        _loop("greedy_diverse", s, partial(diverse, objective, *s, 4096), f"{objective}, ")
        for objective in objectives
        for s in budgets
    ]
    budgets = [(1, 576, 64), (8, 576, 64), (1, 2880, 320)]
    found += [_loop("greedy_map", s, partial(determinant, *s, 1024)) for s in budgets]
    groups = [(1, 576, 64), (8, 576, 64), (32, 2880, 320)]
    found += [
        Case("group_topk", _budget(*s), "topk and sort, image by image", partial(topk, *s))
        for s in groups
    ]
    what = "index arithmetic and torch.gather"
    shorter = [(8, 2880, 576, 4096), (1, 576, 64, 4096), (1, 2880, 320, 4096)]
    found += [
        Case("compact", f"{b} × {n + 64:,} → {k + 64} × {d}", what, partial(gathered, b, n, k, d))
        for b, n, k, d in shorter
    ]
    what = "nonzero, row by row"
    found += [
        Case("packed_index", f"{b} × {s:,} → {w}", what, partial(packed, b, s, w))
        for b, s, w in [(1, 2944, 384), (8, 2944, 640)]
    ]
    found += [
        Case("group_merge", f"{_budget(*s)} × 4096", "index_add_", partial(merged, *s, 4096))
        for s in [(1, 576, 64), (8, 2880, 320)]
    ]
    return found


def _tiny() -> list[Case]:
    return [
        Case("attention_rows", "tiny", _MAP, partial(rows, 2, 2, 17, 16)),
        Case("attention_received", "tiny", _MAP, partial(received, 2, 2, 17, 16)),
        Case("causal_mass", "tiny", _MAP, partial(mass, 2, 2, 24, 5, 16)),
        _loop("greedy_diverse", (2, 24, 5), partial(diverse, "k_center", 2, 24, 5, 16), "tiny, "),
        _loop("greedy_map", (2, 24, 5), partial(determinant, 2, 24, 5, 32), "tiny, "),
        Case("group_topk", "tiny", "topk and sort", partial(topk, 3, 24, 5)),
        Case("compact", "tiny", "torch.gather", partial(gathered, 2, 24, 5, 32)),
        Case("packed_index", "tiny", "nonzero", partial(packed, 2, 24, 7)),
        Case("group_merge", "tiny", "index_add_", partial(merged, 2, 24, 5, 32)),
    ]


def _loop(
    op: str, size: tuple[int, int, int], make: Callable[[torch.device], Given], name: str = ""
) -> Case:
    return Case(op, name + _budget(*size), _LOOP, make, loops=True)


def _budget(groups: int, n: int, keep: int) -> str:
    images = "" if groups == 1 else f"{groups} × "
    return f"{images}{n:,} → {keep}"
