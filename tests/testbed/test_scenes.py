"""Scenes and questions: answers are what a look at the scene says, and nothing gives them away."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch

from vtc.testbed import scenes
from vtc.testbed.balance import GROUP, balanced
from vtc.testbed.questions import ask, caption
from vtc.testbed.vocabulary import ANSWERS, COLORS, KIND_NAMES, KINDS, PLURALS, SHAPES, phrase


def draw(count: int, seed: int = 0, **need: bool) -> scenes.Scene:
    return scenes.sample(scenes.uniforms(count, torch.Generator().manual_seed(seed)), **need)


def objects(scene: scenes.Scene, i: int) -> list[tuple[str, str, float, float]]:
    """(color, shape, x, y) of the objects of one scene."""
    return [
        (COLORS[scene.color[i, o]], SHAPES[scene.shape[i, o]], *scene.center[i, o].tolist())
        for o in range(scenes.OBJECTS)
        if scene.present[i, o]
    ]


def look(question: str, scene: scenes.Scene, i: int) -> str:
    """The answer by reading the question's words and going through the objects one by one."""
    found, words = objects(scene, i), question.strip("?").split()
    colors = [w for w in words if w in COLORS]
    shapes = [w for w in words if w in SHAPES]
    plural = [SHAPES[PLURALS.index(w)] for w in words if w in PLURALS]
    if ("number" in words and ("card" in words or "read" in words)) or "read" in words:
        return str(int(scene.number[i]))
    if "digit" in words:
        return str(int(scene.digit[i]))
    if question.startswith(("how many", "what is the number of")):
        return str(sum(s in plural if plural else c in colors for c, s, _, _ in found))
    if "left or" in question or "top or" in question:
        ((x, y),) = [(x, y) for c, s, x, y in found if (c, s) == (colors[0], shapes[0])]
        low, high, at = ("left", "right", x) if "left or" in question else ("top", "bottom", y)
        return low if at < scenes.SIZE / 2 else high
    if relation := {"left", "right", "above", "below"} & set(words):
        (a,), (b,) = (
            [(x, y) for c, s, x, y in found if (c, s) == pair]
            for pair in zip(colors, shapes, strict=True)
        )
        sides = {"left": a[0] < b[0], "right": a[0] > b[0], "above": a[1] < b[1], "below": 1}
        sides["below"] = a[1] > b[1]
        return "yes" if sides[relation.pop()] else "no"
    if "any" in words:
        seen = any(s in shapes and (not colors or c in colors) for c, s, _, _ in found)
        return "yes" if seen else "no"
    if shapes:
        (color,) = [c for c, s, _, _ in found if s == shapes[0]]
        return color
    (shape,) = [s for c, s, _, _ in found if c == colors[0]]
    return shape


def asked_of(kind: str, seed: int = 0) -> tuple[scenes.Scene, Any]:
    return balanced(kind, scenes.uniforms(80, torch.Generator().manual_seed(seed)))


def texts(kind: str, asked: Any) -> list[tuple[str, str]]:
    return [
        (phrase(kind, int(t), tuple(f.tolist())), "".join(ANSWERS[j] for j in a.tolist() if j >= 0))
        for t, f, a in zip(asked.template, asked.fillers, asked.answer, strict=True)
    ]


@pytest.mark.parametrize("kind", KIND_NAMES)
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_answers_are_what_a_look_says(kind: str, seed: int) -> None:
    scene, asked = asked_of(kind, seed)
    for i, (question, answer) in enumerate(texts(kind, asked)):
        assert look(question, scene, i) == answer, question


@pytest.mark.parametrize("kind", [k for k in KIND_NAMES if k not in ("number", "digit")])
def test_unbalanced_training_questions_are_right_too(kind: str) -> None:
    scene = draw(200, 5)
    for i, (question, answer) in enumerate(texts(kind, ask(scene, kind))):
        assert look(question, scene, i) == answer, question


@pytest.mark.parametrize("kind", KIND_NAMES)
def test_a_group_shares_its_words_and_has_every_answer_once(kind: str) -> None:
    _, asked = asked_of(kind)
    pairs, size = texts(kind, asked), GROUP[kind]
    for start in range(0, len(pairs), size):
        group = pairs[start : start + size]
        assert len({question for question, _ in group}) == 1
        if kind != "number":  # ninety answers
            assert len({answer for _, answer in group}) == size == round(1 / KINDS[kind])


@pytest.mark.parametrize("kind", KIND_NAMES)
def test_evidence_is_what_the_answer_is_about(kind: str) -> None:
    scene, asked = asked_of(kind)
    for i, (question, answer) in enumerate(texts(kind, asked)):
        places = asked.evidence[i].nonzero()[:, 0].tolist()
        assert all(scene.present[i, p] for p in places)
        if kind == "count":
            assert len(places) == int(answer)
        elif kind == "existence":
            assert bool(places) == (answer == "yes")
        elif kind == "relation":
            assert len(places) == 2
        elif kind in ("number", "digit"):
            assert places == [scenes.NUMBER_PLACE if kind == "number" else scenes.DIGIT_PLACE]
        else:
            (place,) = places
            named = {COLORS[scene.color[i, place]], SHAPES[scene.shape[i, place]]}
            assert named & set(question.strip("?").split())


def test_nothing_overlaps_and_no_two_objects_are_alike() -> None:
    scene = draw(500)
    boxes = scene.boxes()
    for i in range(len(scene)):
        seen = [(c, s) for c, s, _, _ in objects(scene, i)]
        assert 2 <= len(seen) == len(set(seen)) <= scenes.OBJECTS
        there = [boxes[i, p].tolist() for p in range(scenes.PLACES) if scene.present[i, p]]
        for a, box in enumerate(there):
            assert 0 <= box[0] < box[2] <= scenes.SIZE and 0 <= box[1] < box[3] <= scenes.SIZE
            for other in there[:a]:
                apart = box[0] >= other[2] or other[0] >= box[2]
                assert apart or box[1] >= other[3] or other[1] >= box[3]


def test_captions_name_all_objects_from_left_to_right() -> None:
    scene = draw(200)
    colors, shapes, clear = caption(scene)
    assert clear.float().mean() > 0.5
    for i in clear.nonzero()[:, 0].tolist():
        wanted = [(c, s) for c, s, _, _ in sorted(objects(scene, i), key=lambda o: o[2])]
        pairs = zip(colors[i].tolist(), shapes[i].tolist(), strict=True)
        assert [(COLORS[c], SHAPES[s]) for c, s in pairs if c >= 0] == wanted


def test_attributes_of_objects_are_uniform() -> None:
    scene = draw(4000)
    filled = scene.present[:, : scenes.OBJECTS]
    for values in (scene.color[filled], scene.shape[filled]):
        counts = Counter(values.tolist())
        expected = len(values) / 8
        # objects of a scene are drawn together: a generous five standard deviations
        assert all(abs(counts[v] - expected) < 5 * (2 * expected) ** 0.5 for v in range(8))
