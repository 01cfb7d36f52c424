"""Scenes that change: two pictures that differ in one object, and clips of four frames.

Everything but what the question asks about stays as it is: the background, the other objects, the
cards. Letters as in scenes.py; V = pictures of a story, 2 or 4.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import torch
from torch import Tensor

from vtc.testbed.questions import Questions
from vtc.testbed.scenes import CELL, OBJECTS, PLACES, Scene
from vtc.testbed.vocabulary import FIRST_COLOR, FIRST_SHAPE, LEFT, TEMPLATES

FRAMES = 4
# columns of the random numbers of a story: phrasing, frame of the change, object, object and side
TEMPLATE, WHEN = 0, 1
_OBJECT, _MOVE = slice(2, 2 + OBJECTS), slice(2 + OBJECTS, 2 + 5 * OBJECTS)
WIDTH = _MOVE.stop
# left, right, top, bottom in (x, y), in the order of ANSWERS
_SIDES = ((-1, 0), (1, 0), (0, -1), (0, 1))


def uniforms(count: int, generator: torch.Generator) -> Tensor:
    """The random numbers of `count` stories beyond their scene's, [B, WIDTH] in [0, 1)."""
    return torch.rand(count, WIDTH, generator=generator, device=generator.device)


@dataclass(frozen=True)
class Story:
    """The same scenes at V moments, and what happens in them."""

    scenes: tuple[Scene, ...]  # V of them
    changed: Tensor  # long [B], the object that changes its color (in pairs its shape too)
    when: Tensor  # long [B], the first picture with the new look
    mover: Tensor  # long [B], the object that moves (clips only)
    side: Tensor  # long [B], where to: left, right, top, bottom

    def replace(self, **changed: tuple[Scene, ...] | Tensor) -> Story:
        """The same stories with some fields changed."""
        return dataclasses.replace(self, **changed)  # type: ignore[arg-type]


def template(kind: str, u: Tensor) -> Tensor:
    """Which phrasing of `kind` the random numbers choose, [B]."""
    return (len(TEMPLATES[kind]) * u[:, TEMPLATE]).long()


def pair(scene: Scene, u: Tensor) -> Story:
    """Two pictures: in the second, one object has another color and another shape."""
    changed = u[:, _OBJECT].add(1).mul(scene.present[:, :OBJECTS]).argmax(-1)
    zero = torch.zeros_like(changed)
    second = scene.replace(
        color=_put(scene.color, changed, scene.absent_color),
        shape=_put(scene.shape, changed, scene.absent_shape),
    )
    return Story((scene, second), changed, zero + 1, zero, zero)


def move(scene: Scene, u: Tensor) -> tuple[Tensor, Tensor]:
    """An object with a free cell beside it, and the side of that cell: [B], [B]."""
    cell = (scene.center / CELL).long().clamp(0, 3)  # [B, P, 2]
    taken = torch.zeros(len(scene), 16, dtype=torch.long, device=cell.device)
    taken.scatter_add_(1, cell[..., 1] * 4 + cell[..., 0], scene.present.long())
    target = cell[:, :OBJECTS, None] + cell.new_tensor(_SIDES)  # [B, O, 4, 2]
    inside = ((target >= 0) & (target < 4)).all(-1)
    index = (target[..., 1] * 4 + target[..., 0]).clamp(0, 15)
    free = taken.gather(1, index.flatten(1)).view_as(index) == 0
    allowed = inside & free & scene.present[:, :OBJECTS, None]
    best = u[:, _MOVE].add(1).mul(allowed.flatten(1)).argmax(-1)
    return best // 4, best % 4


def clip(scene: Scene, u: Tensor, mover: Tensor, side: Tensor) -> Story:
    """Four frames: `mover` slides a cell to `side`, another object changes its color once."""
    other = torch.arange(OBJECTS, device=u.device) != mover[:, None]
    changed = u[:, _OBJECT].add(1).mul(other & scene.present[:, :OBJECTS]).argmax(-1)
    when = 1 + ((FRAMES - 1) * u[:, WHEN]).long()
    step = CELL * scene.center.new_tensor(_SIDES)[side] / (FRAMES - 1)  # [B, 2]
    moving = torch.nn.functional.one_hot(mover, PLACES)[..., None]
    recolored = _put(scene.color, changed, scene.absent_color)
    frames = tuple(
        scene.replace(
            center=scene.center + k * moving * step[:, None],
            color=torch.where((when <= k)[:, None], recolored, scene.color),
        )
        for k in range(FRAMES)
    )
    return Story(frames, changed, when, mover, side)


def _put(values: Tensor, index: Tensor, new: Tensor) -> Tensor:
    return values.scatter(1, index[:, None], new[:, None])


def ask(story: Story, kind: str, template: Tensor) -> Questions:
    """A question of `kind` about every story; its evidence is bool [B, V, P]."""
    count = len(story.scenes)
    moment = torch.arange(count, device=template.device)
    last = template % 2 == (1 if kind == "difference" else 0)
    fillers = template.new_zeros(len(template), 4)
    place, shown = story.changed, (moment >= story.when[:, None]) == last[:, None]
    if kind == "motion":
        place, shown = story.mover, torch.ones_like(shown)
        fillers[:, 0] = _of(story.scenes[0].color, place)
        fillers[:, 1] = _of(story.scenes[0].shape, place)
        answer = LEFT + story.side
    else:
        first, second = (
            torch.stack([FIRST_COLOR + _of(s.color, place), FIRST_SHAPE + _of(s.shape, place)], 1)
            for s in (story.scenes[0], story.scenes[-1])
        )
        both = torch.where(last[:, None], second, first)
        answer = _of(both, template // 2 if kind == "difference" else torch.zeros_like(template))
    places = torch.nn.functional.one_hot(place, PLACES).bool()
    return Questions(
        template,
        fillers,
        torch.stack([answer, torch.full_like(answer, -1)], 1),
        places[:, None] & shown[..., None],
    )


def _of(values: Tensor, index: Tensor) -> Tensor:
    return values.gather(1, index[:, None])[:, 0]
