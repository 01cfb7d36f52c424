"""Pooling and a smaller picture in plain words: which tokens an image becomes, and where they
stand. Nothing here looks at the package."""

from __future__ import annotations

from dataclasses import replace
from fractions import Fraction
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from vtc.types import Selection

from .fed import Fed
from .models import CROP, FRAMES_PER_PATCH, MERGE, PATCH, PINPOINTS, QWEN
from .oracle import Group, groups, kept_columns
from .prompts import Inputs, Kind, tokens_per_crop, tokens_per_frame

Size = tuple[int, int, int]
# (first token, its grid, pixels that show it)
Part = tuple[int, Size]


def count(keep: float | int, n: int) -> int:
    """Tokens kept of `n`."""
    wanted = keep if isinstance(keep, int) else int(Fraction(keep) * n + Fraction(1, 2))
    return min(max(wanted, 1), n)


def largest(h: int, w: int, most: int) -> tuple[int, int]:
    """The largest grid of the same aspect of at most `most` cells."""
    best = 1, 1
    for k in range(1, h * w + 1):
        scale = Fraction(k, h * w)
        size = max(1, int(scale * h)), max(1, int(scale * w))
        if size[0] * size[1] <= most:
            best = size
    return best


def middles(n: int, m: int) -> list[int]:
    """Of n cells, those that hold the middles of m equal stretches."""
    return [int(Fraction(2 * i + 1, 2 * m) * n) for i in range(m)]


def shared(wanted: int, sizes: list[int]) -> list[int]:
    """Largest remainder; the first of equals."""
    quotas = [Fraction(wanted * n, sum(sizes)) for n in sizes]
    out = [int(q) for q in quotas]
    while sum(out) < wanted:
        rest = [q - int(q) if o == int(q) else Fraction(-1) for q, o in zip(quotas, out)]  # noqa: B905
        out[rest.index(max(rest))] += 1
    return out


def parts_of(family: str, inputs: Inputs, group: Group, which: int) -> list[Part]:
    """Grids of the parts of one image or video, the `which`-th of its kind."""
    n = len(group.tokens)
    if family in QWEN:
        t, h, w = inputs[f"{group.kind}_grid_thw"][which].tolist()
        return [(0, (t, h // MERGE, w // MERGE))]
    if group.kind == "video":
        half = round(tokens_per_frame(family) ** 0.5)
        return [(0, (n // half**2, half, half))]
    one = tokens_per_crop(family)
    side = round(one**0.5)
    if family in PINPOINTS and n > one:
        width = len(group.newlines[0].members)
        return [(0, (1, side, side)), (one, (1, (n - one) // width, width))]
    return [(start, (1, side, side)) for start in range(0, n, one)]


def _overview(family: str, parts: list[Part]) -> Part:
    return parts[-1 if family == "internvl" else 0]


def _centers(part: Part, size: Size) -> Tensor:
    start, (_, h, w) = part
    t, y, x = (torch.tensor(middles(n, m)) for n, m in zip(part[1], size, strict=True))
    return (start + (t[:, None, None] * h + y[:, None]) * w + x).flatten()


def average_pool(
    model: Any, family: str, inputs: Inputs, given: Fed, keep: float | int
) -> tuple[Fed, Tensor]:
    """Every image pooled; its tokens stand at the centers of what they average."""

    def tokens(group: Group, which: int, features: Tensor) -> tuple[Tensor, Tensor]:
        parts = parts_of(family, inputs, group, which)
        sizes = [t * h * w for _, (t, h, w) in parts]
        where, what = [], []
        for part, share in zip(parts, shared(count(keep, sum(sizes)), sizes), strict=True):
            if not share:
                continue
            start, grid = part
            frames = min(grid[0], share)
            size = frames, *largest(grid[1], grid[2], share // frames)
            own = features[start : start + grid[0] * grid[1] * grid[2]]
            pooled = F.adaptive_avg_pool3d(own.T.reshape(1, -1, *grid), size)
            what.append(pooled.flatten(2)[0].T)
            where.append(_centers(part, size))
        return torch.cat(where), torch.cat(what)

    return _replaced(model, family, inputs, given, tokens)


def downsample(
    model: Any, family: str, inputs: Inputs, given: Fed, keep: float | int
) -> tuple[Fed, Tensor]:
    """The overview of every image, every frame of a video, made smaller before the encoder."""

    def tokens(group: Group, which: int, features: Tensor) -> tuple[Tensor, Tensor]:
        parts = parts_of(family, inputs, group, which)
        part = _overview(family, parts)
        t, h, w = part[1]
        total = sum(a * b * c for _, (a, b, c) in parts)
        size = t, *largest(h, w, min(count(keep, total), t * h * w) // t)
        with torch.no_grad():
            small = encoded(model, family, inputs, group.kind, which, size)
        return _centers(part, size), small

    return _replaced(model, family, inputs, given, tokens)


def merged(
    model: Any, family: str, inputs: Inputs, given: Fed, selection: Selection
) -> tuple[Fed, Tensor]:
    """Kept tokens as the weighted sums that a selection without appended ones says."""
    embeds, deep = given.embeds.clone(), None if given.deep is None else given.deep.clone()
    assert selection.merge is not None
    for g, group in enumerate(groups(model, family, inputs)):
        sums: dict[int, list[tuple[int, float]]] = {}
        for slot, token, weight in zip(*(x[g].tolist() for x in selection.merge), strict=True):
            if weight:
                sums.setdefault(int(selection.keep[g, slot]), []).append((token, weight))
        for kept, parts in sums.items():
            for new, old in ((embeds, given.embeds), (deep, given.deep)):
                if new is not None and old is not None:
                    total = sum(w * old[tuple(group.tokens[token])] for token, w in parts)
                    new[tuple(group.tokens[kept])] = total
    return replace(given, embeds=embeds, deep=deep), kept_columns(model, family, inputs, selection)


def _replaced(
    model: Any, family: str, inputs: Inputs, given: Fed, tokens: Any
) -> tuple[Fed, Tensor]:
    """New tokens at their columns, and which columns are left `[B, S]`."""
    embeds, kept = given.embeds.clone(), torch.ones_like(given.mask, dtype=torch.bool)
    deep = None if given.deep is None else given.deep.clone()
    seen = {"image": 0, "video": 0}
    for group in groups(model, family, inputs):
        at = tuple(group.tokens.T)
        features = embeds[at] if deep is None else torch.cat([embeds[at], deep[at]], -1)
        where, what = tokens(group, seen[group.kind], features)
        seen[group.kind] += 1
        there = tuple(group.tokens[where].T)
        kept[at] = False
        kept[there] = True
        for newline in group.newlines:
            kept[tuple(newline.place)] = bool(torch.isin(newline.members, where).any())
        embeds[there] = what[:, : embeds.shape[-1]]
        if deep is not None:
            deep[there] = what[:, embeds.shape[-1] :]
    return replace(given, embeds=embeds, deep=deep), kept


def _resized(frames: Tensor, h: int, w: int) -> Tensor:
    options: dict[str, Any] = {"mode": "bicubic", "antialias": True, "align_corners": False}
    return F.interpolate(frames, size=(h, w), **options)


def encoded(model: Any, family: str, inputs: Inputs, kind: Kind, which: int, size: Size) -> Tensor:
    """Tokens of the resized overview, and beside them what DeepStack adds."""
    if family in QWEN:
        return _qwen(model, inputs, kind, which, size)
    pixels = inputs["pixel_values" if kind == "image" else "pixel_values_videos"]
    if family == "internvl":
        n = tokens_per_crop(family)
        tiles = [len(g.tokens) // n for g in groups(model, family, inputs)]
        frames = pixels[sum(tiles[: which + 1]) - 1][None]
        small = _resized(frames, size[1] * PATCH * MERGE, size[2] * PATCH * MERGE)
        return model.model.get_image_features(small).pooler_output[0]
    frames = pixels[which]
    if frames.dim() == 3 or kind == "image":
        frames = frames.view(-1, 3, CROP[family], CROP[family])[:1]
    small = _resized(frames, size[1] * PATCH, size[2] * PATCH)
    tower = model.model.vision_tower
    states = tower(small, interpolate_pos_encoding=True, output_hidden_states=True).hidden_states
    hidden = states[model.config.vision_feature_layer]
    cls = hidden.shape[1] - size[1] * size[2]
    return model.model.multi_modal_projector(hidden[:, cls:]).flatten(0, 1)


def _qwen(model: Any, inputs: Inputs, kind: Kind, which: int, size: Size) -> Tensor:
    grids = inputs[f"{kind}_grid_thw"]
    name = "pixel_values" if kind == "image" else "pixel_values_videos"
    patches = inputs[name].split(grids.prod(-1).tolist())[which]
    frames = laid_out(patches, grids[which].tolist())
    t, h, w = size[0], size[1] * MERGE, size[2] * MERGE
    small = cut_up(_resized(frames, h * PATCH, w * PATCH), (t, h, w))
    features = model.model.get_image_features if kind == "image" else model.model.get_video_features
    out = features(small, torch.tensor([[t, h, w]]))
    deep = getattr(out, "deepstack_features", None) or []
    # some versions split each layer by image
    deep = [layer if isinstance(layer, Tensor) else layer[0] for layer in deep]
    return torch.cat([out.pooler_output[0], *deep], -1)


def _places(grid: list[int] | Size) -> list[tuple[int, int, int]]:
    """(frame pair, row, column) of each patch, in the order of the processor."""
    t, h, w = grid
    return [
        (f, y + dy, x + dx)
        for f in range(t)
        for y in range(0, h, MERGE)
        for x in range(0, w, MERGE)
        for dy in range(MERGE)
        for dx in range(MERGE)
    ]


def laid_out(patches: Tensor, grid: list[int]) -> Tensor:
    """Patches of channels, frames, rows, columns -> frames `[t · 2, 3, H, W]`."""
    t, h, w = grid
    out = torch.zeros(t * FRAMES_PER_PATCH, 3, h * PATCH, w * PATCH)
    for patch, (f, y, x) in zip(patches, _places(grid), strict=True):
        one = patch.view(3, FRAMES_PER_PATCH, PATCH, PATCH).transpose(0, 1)
        first, rows, columns = f * FRAMES_PER_PATCH, y * PATCH, x * PATCH
        pair = out[first : first + FRAMES_PER_PATCH]
        pair[:, :, rows : rows + PATCH, columns : columns + PATCH] = one
    return out


def cut_up(frames: Tensor, grid: Size) -> Tensor:
    """The way back."""
    out = []
    for f, y, x in _places(grid):
        pair = frames[f * FRAMES_PER_PATCH : (f + 1) * FRAMES_PER_PATCH]
        one = pair[:, :, y * PATCH : (y + 1) * PATCH, x * PATCH : (x + 1) * PATCH]
        out.append(one.transpose(0, 1).flatten())
    return torch.stack(out)
