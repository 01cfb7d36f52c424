"""Balanced test questions: each group of them shares its words and has every answer once.

A world that is symmetric in colors, shapes and sides allows it exactly: relabel a scene, or mirror
it, until it asks the words of the group's first scene and has the answer whose turn it is. So a
model that never sees the picture is right for one in a group, whatever it learned.
"""

from __future__ import annotations

import torch
from torch import Tensor

from vtc.testbed import changes
from vtc.testbed.changes import Story
from vtc.testbed.questions import ALL_KINDS, Questions, ask, relation_gap
from vtc.testbed.scenes import COLUMNS, SIZE, Scene, sample
from vtc.testbed.vocabulary import FIRST_COLOR, FIRST_SHAPE

# questions that share their words; a number has too many answers and shares only its template
GROUP = {
    "existence": 2,
    "color": 8,
    "shape": 8,
    "count": 4,
    "where": 2,
    "relation": 2,
    "number": 2,
    "digit": 10,
    "difference": 8,
    "change": 8,
    "motion": 4,
}


def balanced(kind: str, u: Tensor) -> tuple[Scene, Questions]:
    """Scenes and questions of one kind from random numbers `u` [B, WIDTH], B a multiple of 40."""
    group = GROUP[kind]
    index = torch.arange(len(u), device=u.device)
    leader, turn = index // group * group, index % group
    u = u.clone()
    column = COLUMNS["template"].start + ALL_KINDS.index(kind)
    shared = [column, COLUMNS["axis"].start]
    if kind == "count":
        shared.append(COLUMNS["repeat_shape"].start)
    for i in shared:
        u[:, i] = u[leader, i]
    _fix_answers(kind, u, turn)
    scene = sample(u, need_number=kind == "number", need_digit=kind == "digit")
    if kind in ("where", "relation"):
        scene = _mirror(kind, scene, leader, turn)
    scene = _relabel(kind, scene, leader, turn)
    return scene, ask(scene, kind)


def _fix_answers(kind: str, u: Tensor, turn: Tensor) -> None:
    """Overwrites the random numbers that decide the answer, in place."""
    if kind == "existence":
        u[:, COLUMNS["yes"].start] = torch.where(turn == 0, 0.0, 0.9)
    elif kind == "count":
        u[:, COLUMNS["zero"].start] = torch.where(turn == 0, 0.0, 0.9)
        u[:, COLUMNS["repeats"].start] = (turn.clamp(min=1) - 0.5) / 3
    elif kind == "digit":
        u[:, COLUMNS["digit"].start] = (turn + 0.5) / 10


def _mirror(kind: str, scene: Scene, leader: Tensor, turn: Tensor) -> Scene:
    """Flips positions so that the members of a group differ in the side or the order."""
    if kind == "relation":
        template = ask(scene, kind).template[leader]
        vertical = template >= 2
        gap = relation_gap(scene).abs()
        near = torch.where(vertical, gap[:, 1], gap[:, 0]) < 14
        center = torch.where(near[:, None, None], scene.center.flip(-1), scene.center)
        # which axis is asked, where both are possible
        u = scene.u.clone()
        u[:, COLUMNS["axis"].start] = torch.where(vertical, 0.0, 0.9)
        scene = scene.replace(center=center, u=u)
    else:
        vertical = ask(scene, kind).template == 1
    answer = ask(scene, kind).answer[:, 0]
    # answers come in pairs (2i, 2i + 1): yes and no, left and right, top and bottom
    wanted = torch.where(turn == 0, answer, answer[leader] ^ 1)
    flip = (answer != wanted)[:, None] & torch.stack([~vertical, vertical], 1)
    center = torch.where(flip[:, None], SIZE - scene.center, scene.center)
    return scene.replace(center=center)


def _relabel(kind: str, scene: Scene, leader: Tensor, turn: Tensor) -> Scene:
    """Renames colors and shapes so that every question has the words of its group's first."""
    question = ask(scene, kind)
    own, wanted = question.fillers, question.fillers[leader]
    colors = torch.arange(8, device=own.device).expand(len(own), -1).clone()
    shapes = colors.clone()
    if kind == "color":
        _swap(colors, question.answer[:, 0] - FIRST_COLOR, turn)
    if kind == "shape":
        _swap(shapes, question.answer[:, 0] - FIRST_SHAPE, turn)
    by_color, by_shape = question.template >= 0, question.template >= 0
    if kind == "existence":
        by_color = question.template < 2
    if kind == "count":
        by_color, by_shape = question.template >= 2, question.template < 2
    if kind == "color":
        by_color = torch.zeros_like(by_color)
    if kind == "shape":
        by_shape = torch.zeros_like(by_shape)
    pairs = 2 if kind == "relation" else 1 if kind not in ("number", "digit") else 0
    for i in range(pairs):
        for table, column, active in ((colors, 2 * i, by_color), (shapes, 2 * i + 1, by_shape)):
            target = torch.where(
                active, wanted[:, column], table.gather(1, own[:, column, None])[:, 0]
            )
            _swap(table, own[:, column], target)
    return renamed(scene, colors, shapes)


def renamed(scene: Scene, colors: Tensor, shapes: Tensor) -> Scene:
    """The scenes with new names: color i of row b becomes `colors[b, i]`, shapes alike."""
    return scene.replace(
        color=colors.gather(1, scene.color),
        shape=shapes.gather(1, scene.shape),
        absent_color=colors.gather(1, scene.absent_color[:, None])[:, 0],
        absent_shape=shapes.gather(1, scene.absent_shape[:, None])[:, 0],
    )


def _swap(table: Tensor, source: Tensor, target: Tensor) -> None:
    """Changes the permutations `table` [B, 8] in place so that `source` maps to `target`."""
    old = table.gather(1, source[:, None])
    where = (table == target[:, None]).long().argmax(-1, keepdim=True)
    table.scatter_(1, where, old)
    table.scatter_(1, source[:, None], target[:, None])


def balanced_story(kind: str, u: Tensor, more: Tensor) -> tuple[Story, Questions]:
    """As `balanced`, for questions about two pictures or a clip; `more` [B, changes.WIDTH]."""
    group = GROUP[kind]
    index = torch.arange(len(u), device=u.device)
    leader, turn = index // group * group, index % group
    more = more.clone()
    more[:, changes.TEMPLATE] = more[leader, changes.TEMPLATE]
    scene = sample(u)
    if kind == "difference":
        story = changes.pair(scene, more)
    else:
        mover, side = changes.move(scene, more)
        if kind == "motion":
            scene, side = _turned(scene, side, turn), turn
        story = changes.clip(scene, more, mover, side)
    asked = changes.ask(story, kind, changes.template(kind, more))
    colors = torch.arange(8, device=u.device).expand(len(u), -1).clone()
    shapes = colors.clone()
    if kind == "motion":
        _swap(colors, asked.fillers[:, 0], asked.fillers[leader, 0])
        _swap(shapes, asked.fillers[:, 1], asked.fillers[leader, 1])
    else:
        answer = asked.answer[:, 0]
        of_shape = answer >= FIRST_SHAPE
        # rows that ask for the other attribute map a name to itself
        color = torch.where(of_shape, 0, answer - FIRST_COLOR)
        shape = torch.where(of_shape, answer - FIRST_SHAPE, 0)
        _swap(colors, color, torch.where(of_shape, color, turn))
        _swap(shapes, shape, torch.where(of_shape, turn, shape))
    story = story.replace(scenes=tuple(renamed(s, colors, shapes) for s in story.scenes))
    return story, changes.ask(story, kind, asked.template)


def _turned(scene: Scene, side: Tensor, wanted: Tensor) -> Scene:
    """Scenes transposed and mirrored so that what moved to `side` moves to `wanted`."""
    across = (side // 2 != wanted // 2)[:, None, None]
    center = torch.where(across, scene.center.flip(-1), scene.center)
    # left and right, top and bottom are pairs (2i, 2i + 1)
    mirrored = side % 2 != wanted % 2
    axes = torch.stack([mirrored & (wanted < 2), mirrored & (wanted >= 2)], 1)
    return scene.replace(center=torch.where(axes[:, None], SIZE - center, center))
