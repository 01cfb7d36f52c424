"""Questions about scenes, their answers and the places that carry the answer, as tensors.

Every choice is symmetric in colors, shapes, sides and digits, so given the words of a question all
its answers are equally likely.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from vtc.testbed.scenes import DIGIT_PLACE, NUMBER_PLACE, OBJECTS, PLACES, SIZE, Scene
from vtc.testbed.vocabulary import (
    CAPTION,
    FIRST_COLOR,
    FIRST_SHAPE,
    KIND_NAMES,
    LEFT,
    NO,
    TEMPLATES,
    TOP,
    YES,
)

ALL_KINDS = (*KIND_NAMES, CAPTION)


@dataclass(frozen=True)
class Questions:
    """One question of one kind about each scene."""

    template: Tensor  # long [B], which phrasing
    fillers: Tensor  # long [B, 4]: color, shape, second color, second shape (0 where unused)
    answer: Tensor  # long [B, 2]: indices into ANSWERS, the second -1 but for numbers
    evidence: Tensor  # bool [B, P]: the places that carry the answer


def ask(scene: Scene, kind: str) -> Questions:
    """A question of `kind` about every scene. Those about a card assume that it is present."""
    return _ASK[kind](scene)


def _template(scene: Scene, kind: str) -> Tensor:
    u = scene.column("template")[:, ALL_KINDS.index(kind)]
    return (len(TEMPLATES[kind]) * u).long()


def _pick(scene: Scene, kind: str, allowed: Tensor) -> Tensor:
    """A random object among the `allowed` [B, O], as an index [B]."""
    keys = scene.column("pick").view(-1, len(ALL_KINDS), OBJECTS)[:, ALL_KINDS.index(kind)]
    return (keys + 1).mul(allowed).argmax(-1)


def _at(values: Tensor, index: Tensor) -> Tensor:
    return values.gather(1, index[:, None])[:, 0]


def _fill(*fillers: Tensor) -> Tensor:
    zero = torch.zeros_like(fillers[0])
    return torch.stack([*fillers, *[zero] * (4 - len(fillers))], 1)


def _single(answer: Tensor) -> Tensor:
    return torch.stack([answer, torch.full_like(answer, -1)], 1)


def _objects(scene: Scene) -> Tensor:
    return scene.present[:, :OBJECTS]


def _places(objects: Tensor) -> Tensor:
    """Evidence among the objects [B, O] as evidence among all places [B, P]."""
    return torch.nn.functional.pad(objects, (0, PLACES - OBJECTS))


def _unique(values: Tensor, filled: Tensor) -> Tensor:
    """Which objects are alone in having their value, [B, O]."""
    same = (values[:, :, None] == values[:, None]) & filled[:, None]
    return filled & (same.sum(-1) == 1)


def _existence(scene: Scene) -> Questions:
    filled, template = _objects(scene), _template(scene, "existence")
    yes, only_shape = scene.column("yes") < 0.5, template >= 2
    one = _pick(scene, "existence", filled)
    color, shape = _at(scene.color, one), _at(scene.shape, one)
    # a pair that is not there: half of the time made of a color and a shape that both are
    other = (one + 1) % filled.sum(-1)
    mixed = _at(scene.shape, other)
    clash = ((scene.color == color[:, None]) & (scene.shape == mixed[:, None]) & filled).any(-1)
    how = scene.column("negative")
    no_shape = torch.where((how < 0.5) & ~clash, mixed, scene.absent_shape)
    swap = how > 0.75
    no_color = torch.where(swap, scene.absent_color, color)
    no_shape = torch.where(only_shape, scene.absent_shape, torch.where(swap, shape, no_shape))
    color = torch.where(yes, color, no_color)
    shape = torch.where(yes, shape, no_shape)
    match = (scene.shape == shape[:, None]) & filled
    match &= only_shape[:, None] | (scene.color == color[:, None])
    color = torch.where(only_shape, 0, color)
    answer = torch.where(yes, YES, NO)
    return Questions(template, _fill(color, shape), _single(answer), _places(match))


def _color(scene: Scene) -> Questions:
    one = _pick(scene, "color", _unique(scene.shape, _objects(scene)))
    color, shape = _at(scene.color, one), _at(scene.shape, one)
    fillers = _fill(torch.zeros_like(shape), shape)
    evidence = torch.nn.functional.one_hot(one, PLACES).bool()
    return Questions(_template(scene, "color"), fillers, _single(FIRST_COLOR + color), evidence)


def _shape(scene: Scene) -> Questions:
    one = _pick(scene, "shape", _unique(scene.color, _objects(scene)))
    color, shape = _at(scene.color, one), _at(scene.shape, one)
    evidence = torch.nn.functional.one_hot(one, PLACES).bool()
    return Questions(
        _template(scene, "shape"), _fill(color), _single(FIRST_SHAPE + shape), evidence
    )


def _count(scene: Scene) -> Questions:
    by_shape, zero = scene.repeat_shape, scene.column("zero") < 0.25
    color = torch.where(zero, scene.absent_color, scene.color[:, 0])
    shape = torch.where(zero, scene.absent_shape, scene.shape[:, 0])
    same = torch.where(
        by_shape[:, None], scene.shape == shape[:, None], scene.color == color[:, None]
    )
    same &= _objects(scene)
    template = _template(scene, "count") % 2 + torch.where(by_shape, 0, 2)
    fillers = _fill(torch.where(by_shape, 0, color), torch.where(by_shape, shape, 0))
    return Questions(template, fillers, _single(same.sum(-1)), _places(same))


def _where(scene: Scene) -> Questions:
    template = _template(scene, "where")
    one = _pick(scene, "where", _objects(scene))
    beyond = _at((scene.center > SIZE / 2).long().flatten(1), 2 * one + template)
    answer = torch.where(template == 0, LEFT, TOP) + beyond
    fillers = _fill(_at(scene.color, one), _at(scene.shape, one))
    evidence = torch.nn.functional.one_hot(one, PLACES).bool()
    return Questions(template, fillers, _single(answer), evidence)


def relation_pair(scene: Scene) -> tuple[Tensor, Tensor]:
    """The two objects a relation is asked about: different in color and in shape. [B], [B]."""
    filled = _objects(scene)
    differ = (scene.color[:, :, None] != scene.color[:, None]) & (
        scene.shape[:, :, None] != scene.shape[:, None]
    )
    allowed = differ & filled[:, :, None] & filled[:, None]
    best = (scene.column("pair") + 1).mul(allowed.flatten(1)).argmax(-1)
    return best // OBJECTS, best % OBJECTS


def relation_gap(scene: Scene) -> Tensor:
    """From the second object of the relation to the first, in pixels: [B, 2]."""
    one, two = relation_pair(scene)
    row = torch.arange(len(scene), device=one.device)
    return scene.center[row, one] - scene.center[row, two]


def _relation(scene: Scene) -> Questions:
    one, two = relation_pair(scene)
    gap = relation_gap(scene)
    # objects in different cells of an axis are at least 19 pixels apart, in the same one at most 9
    apart = gap.abs() > 14
    vertical = torch.where(apart.all(-1), scene.column("axis") < 0.5, apart[:, 1])
    after = _template(scene, "relation") % 2  # right of, below
    forward = torch.where(vertical, gap[:, 1], gap[:, 0]) > 0
    answer = torch.where(forward == after.bool(), YES, NO)
    fillers = torch.stack(
        [
            values.gather(1, i[:, None])[:, 0]
            for i in (one, two)
            for values in (scene.color, scene.shape)
        ],
        1,
    )
    spots = torch.arange(PLACES, device=one.device)
    evidence = (spots == one[:, None]) | (spots == two[:, None])
    return Questions(after + 2 * vertical.long(), fillers, _single(answer), evidence)


def _number(scene: Scene) -> Questions:
    template = _template(scene, "number")
    answer = torch.stack([scene.number // 10, scene.number % 10], 1)
    evidence = torch.arange(PLACES, device=template.device) == NUMBER_PLACE
    return Questions(
        template, _fill(torch.zeros_like(template)), answer, evidence.expand(len(scene), -1)
    )


def _digit(scene: Scene) -> Questions:
    template = _template(scene, "digit")
    evidence = torch.arange(PLACES, device=template.device) == DIGIT_PLACE
    return Questions(
        template,
        _fill(torch.zeros_like(template)),
        _single(scene.digit),
        evidence.expand(len(scene), -1),
    )


_ASK: dict[str, Callable[[Scene], Questions]] = {
    "existence": _existence,
    "color": _color,
    "shape": _shape,
    "count": _count,
    "where": _where,
    "relation": _relation,
    "number": _number,
    "digit": _digit,
}


def caption(scene: Scene) -> tuple[Tensor, Tensor, Tensor]:
    """The objects from left to right: colors [B, O], shapes [B, O] (-1 after the last), clear [B].

    `clear` says that no two objects are closer than 2 pixels in x, so the order is beyond doubt.
    """
    filled = _objects(scene)
    x = scene.center[:, :OBJECTS, 0].masked_fill(~filled, 1e4)
    x, order = x.sort(-1)
    there = filled.gather(1, order)
    gaps = (x[:, 1:] - x[:, :-1]).masked_fill(~there[:, 1:], 1e4)
    colors = scene.color.gather(1, order).masked_fill(~there, -1)
    shapes = scene.shape.gather(1, order).masked_fill(~there, -1)
    return colors, shapes, gaps.min(-1).values >= 2
