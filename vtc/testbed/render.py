"""Paints scenes: real or smooth backgrounds, gray clutter, objects and cards, all as tensors.

Shapes are signed distance fields looked up through an affine map, so a whole batch is one
`grid_sample` and edges are antialiased at any size. Letters as in scenes.py; S = 112 pixels.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from vtc.testbed.pictures import REACH, Pictures
from vtc.testbed.scenes import DIGIT_PLACE, NUMBER_PLACE, OBJECTS, SIZE, Scene

CLUTTER = 4


def paint(
    scene: Scene, pictures: Pictures, generator: torch.Generator, contrast: float = 1.0
) -> tuple[Tensor, Tensor]:
    """Images uint8 [B, 3, S, S] and the share of every place in every pixel, float [B, P, S, S].

    `generator` draws what no question asks about: the background, clutter, shades and noise.
    """
    image, cover = _clean(scene, pictures, generator, contrast)
    return _noisy(image, generator), cover


def paint_all(
    scenes: Sequence[Scene], pictures: Pictures, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """The same scenes at V moments, uint8 [B, V, 3, S, S], and the covers [B, V, P, S, S].

    All that no question asks about is drawn once; only the noise is new in each picture.
    """
    before, clean = generator.get_state(), []
    for scene in scenes:
        generator.set_state(before)
        clean.append(_clean(scene, pictures, generator, 1.0))
    images = torch.stack([_noisy(image, generator) for image, _ in clean], 1)
    return images, torch.stack([cover for _, cover in clean], 1)


def _noisy(image: Tensor, generator: torch.Generator) -> Tensor:
    noise = torch.randn(image.shape, generator=generator, device=image.device)
    return (image + 3 * noise).clamp(0, 255).round().to(torch.uint8)


def _clean(
    scene: Scene, pictures: Pictures, generator: torch.Generator, contrast: float
) -> tuple[Tensor, Tensor]:
    size = len(scene)
    image = _background(size, pictures, generator, contrast)
    image = _clutter(image, generator)
    ink, cover = _objects(scene, pictures, generator)
    image = image * (1 - cover.sum(1, keepdim=True)) + ink
    covers = [cover]
    for place, sheet in ((NUMBER_PLACE, _number_sheet), (DIGIT_PLACE, _digit_sheet)):
        image, card = _card(image, scene, place, sheet(scene, pictures), generator)
        covers.append(card)
    return image, torch.cat(covers, 1)


def _rand(*shape: int, generator: torch.Generator) -> Tensor:
    return torch.rand(*shape, generator=generator, device=generator.device)


def _background(
    size: int, pictures: Pictures, generator: torch.Generator, contrast: float
) -> Tensor:
    """Two of three scenes lie on a cut of a photograph, the others on a smooth texture."""
    draw = _rand(size, 9, generator=generator)
    tiles, edge = pictures.tiles, pictures.tiles.shape[1]
    which = (len(tiles) * draw[:, 0]).long()
    offset = ((edge - SIZE + 1) * draw[:, 1:3]).long()
    ramp = torch.arange(SIZE, device=draw.device).expand(size, -1)
    rows = torch.where(draw[:, 3:4] < 0.5, ramp, SIZE - 1 - ramp) + offset[:, :1]
    cols = torch.where(draw[:, 4:5] < 0.5, ramp, SIZE - 1 - ramp) + offset[:, 1:]
    photo = tiles[which[:, None, None], rows[:, :, None], cols[:, None]].permute(0, 3, 1, 2).float()
    photo = photo * (0.65 + 0.35 * draw[:, [5, 7, 8]])[:, :, None, None]
    coarse = 128 + 45 * torch.randn(size, 3, 4, 4, generator=generator, device=draw.device)
    smooth = F.interpolate(coarse, size=SIZE, mode="bilinear", align_corners=True)
    image = torch.where((draw[:, 6] < 2 / 3)[:, None, None, None], photo, smooth)
    mean = image.mean((2, 3), keepdim=True)
    return mean + contrast * (image - mean)


def _pixels(device: torch.device) -> Tensor:
    """Pixel centers, x and y, [S, S, 2]."""
    ramp = torch.arange(SIZE, device=device) + 0.5
    y, x = torch.meshgrid(ramp, ramp, indexing="ij")
    return torch.stack([x, y], -1)


def _clutter(image: Tensor, generator: torch.Generator) -> Tensor:
    """Short gray strokes that no question asks about."""
    size = len(image)
    draw = _rand(size, CLUTTER, 6, generator=generator)
    start = draw[..., :2] * SIZE
    turn = draw[..., 2] * torch.pi
    along = torch.stack([turn.cos(), turn.sin()], -1)
    delta = _pixels(image.device) - start[:, :, None, None]  # [B, C, S, S, 2]
    length = (6 + 18 * draw[..., 3])[..., None, None]
    along = along[:, :, None, None]
    t = (delta * along).sum(-1).clamp(min=0).minimum(length)
    distance = (delta - t[..., None] * along).norm(dim=-1)
    shown = (draw[..., 5] < 0.5)[..., None, None]
    alpha = (1.5 - distance).clamp(0, 1) * shown
    for c in range(CLUTTER):
        gray = (40 + 180 * draw[:, c, 4])[:, None, None, None]
        image = torch.lerp(image, gray.expand_as(image), alpha[:, c : c + 1])
    return image


def _local(scene: Scene, first: int, last: int) -> Tensor:
    """Pixel coordinates relative to each place, turned by its angle: [B, last - first, S, S, 2]."""
    delta = _pixels(scene.center.device) - scene.center[:, first:last, None, None]
    sin, cos = scene.angle.sin(), scene.angle.cos()
    sin, cos = (x[:, first:last, None, None] for x in (sin, cos))
    x, y = delta[..., 0], delta[..., 1]
    return torch.stack([cos * x + sin * y, cos * y - sin * x], -1)


def _objects(scene: Scene, pictures: Pictures, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Painted objects premultiplied [B, 3, S, S] and the cover of each [B, O, S, S]."""
    radius = scene.half[:, :OBJECTS, 0]
    grid = _local(scene, 0, OBJECTS) / (REACH * radius[..., None, None, None])
    fields = pictures.fields[scene.shape].flatten(0, 1)[:, None]  # [B*O, 1, T, T]
    distance = F.grid_sample(
        fields, grid.flatten(0, 1), mode="bilinear", padding_mode="border", align_corners=False
    )
    distance = distance.view(len(scene), OBJECTS, SIZE, SIZE) * radius[..., None, None]
    cover = (0.5 - distance).clamp(0, 1) * scene.present[:, :OBJECTS, None, None]
    inside = (-0.5 - distance).clamp(0, 1)
    shade = 26 * _rand(len(scene), OBJECTS, 3, generator=generator) - 13
    color = (pictures.colors[scene.color] + shade).clamp(0, 255)
    # a darker rim sets an object off from a background of its own color
    body = torch.einsum("bohw,boc->bchw", cover * (0.45 + 0.55 * inside), color)
    return body, cover


def _number_sheet(scene: Scene, pictures: Pictures) -> Tensor:
    """Ink of the two digits on a card, [B, 1, 16, 22]."""
    glyphs = pictures.printed
    pair = torch.cat([glyphs[scene.number // 10], glyphs[scene.number % 10]], -1)
    return F.pad(pair, (1, 1, 1, 1))[:, None]


def _digit_sheet(scene: Scene, pictures: Pictures) -> Tensor:
    """Ink of a handwritten sample of the digit, [B, 1, 10, 10]."""
    count = pictures.hand_count[scene.digit]
    sample = (scene.column("digit_sample") * count).long()
    return F.pad(pictures.hand[scene.digit, sample], (1, 1, 1, 1))[:, None]


def _card(
    image: Tensor, scene: Scene, place: int, sheet: Tensor, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """The image with a card laid on it and the cover of the card [B, 1, S, S]."""
    half = scene.half[:, place, None, None]
    local = _local(scene, place, place + 1)[:, 0]
    edge = (half + 0.5 - local.abs()).clamp(0, 1)
    cover = (edge[..., 0] * edge[..., 1] * scene.present[:, place, None, None])[:, None]
    draw = _rand(len(scene), 11, generator=generator)
    spread = 0.0 if place == NUMBER_PLACE else 0.4
    # handwriting leans, stretches and presses differently each time: few samples, many looks
    warp = spread * (draw[:, 6:10].view(-1, 1, 2, 2) - 0.5) + torch.eye(2, device=draw.device)
    grid = (local / half) @ warp
    ink = F.grid_sample(sheet, grid, mode="bilinear", padding_mode="zeros", align_corners=False)
    ink = ink.clamp(min=1e-6) ** (1 + spread * (2 * draw[:, 10] - 1))[:, None, None, None]
    paper = (205 + 50 * draw[:, 0:1] - 18 * draw[:, 1:4])[..., None, None]
    pen = (15 + 60 * draw[:, 4:5])[..., None, None]
    strength = (0.8 + 0.2 * draw[:, 5])[:, None, None, None]
    painted = paper + (pen - paper) * ink * strength
    return torch.lerp(image, painted.expand_as(image), cover), cover
