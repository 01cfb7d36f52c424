"""Pairs and clips: one thing differs, the answer is what a look says, nothing gives it away."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
import torch

from vtc.errors import OptionError
from vtc.testbed import CLIP_KINDS, PAIR_KINDS, changes, examples, pictures, scenes
from vtc.testbed.balance import GROUP, balanced_story
from vtc.testbed.batches import new_story
from vtc.testbed.packing import CLIP, PAIR
from vtc.testbed.render import paint_all
from vtc.testbed.vocabulary import ANSWERS, COLORS, SHAPES, phrase

KINDS = {**PAIR_KINDS, **CLIP_KINDS}


def asked_of(kind: str, seed: int = 0) -> tuple[changes.Story, list[tuple[str, str]], torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    u, more = scenes.uniforms(80, generator), changes.uniforms(80, generator)
    story, asked = balanced_story(kind, u, more)
    texts = [
        (phrase(kind, int(t), tuple(f.tolist())), ANSWERS[a[0]])
        for t, f, a in zip(asked.template, asked.fillers, asked.answer, strict=True)
    ]
    return story, texts, asked.evidence


def objects(scene: scenes.Scene, i: int) -> dict[tuple[str, str], tuple[float, float]]:
    return {
        (COLORS[scene.color[i, o]], SHAPES[scene.shape[i, o]]): tuple(scene.center[i, o].tolist())
        for o in range(scenes.OBJECTS)
        if scene.present[i, o]
    }


def look(question: str, story: changes.Story, i: int) -> str:
    """The answer by comparing what the pictures show."""
    first, last = objects(story.scenes[0], i), objects(story.scenes[-1], i)
    if "move" in question or "moving" in question:
        words = question.strip("?").split()
        ((x0, y0),) = [at for (c, s), at in first.items() if c in words and s in words]
        ((x1, y1),) = [at for (c, s), at in last.items() if c in words and s in words]
        if abs(x1 - x0) > abs(y1 - y0):
            return "left" if x1 < x0 else "right"
        return "top" if y1 < y0 else "bottom"
    ((old_color, old_shape),) = first.keys() - last.keys()
    ((new_color, new_shape),) = last.keys() - first.keys()
    if "changes" in question:
        assert old_shape == new_shape
        return new_color if "new" in question else old_color
    color, shape = (new_color, new_shape) if "second" in question else (old_color, old_shape)
    return color if "color" in question else shape


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_answers_are_what_a_look_says(kind: str, seed: int) -> None:
    story, texts, _ = asked_of(kind, seed)
    for i, (question, answer) in enumerate(texts):
        assert look(question, story, i) == answer, question


@pytest.mark.parametrize("kind", KINDS)
def test_a_group_shares_its_words_and_has_every_answer_once(kind: str) -> None:
    _, texts, _ = asked_of(kind)
    for start in range(0, len(texts), GROUP[kind]):
        group = texts[start : start + GROUP[kind]]
        assert len({question for question, _ in group}) == 1
        assert len({answer for _, answer in group}) == GROUP[kind] == round(1 / KINDS[kind])


def test_without_the_pictures_nobody_beats_chance(unpainted: None) -> None:
    for kind, chance in KINDS.items():
        answers: dict[str, Counter[str]] = {}
        for example in examples(240, kinds=[kind]):
            answers.setdefault(example.question, Counter())[example.answer] += 1
        right = sum(counter.most_common(1)[0][1] for counter in answers.values())
        assert right / 240 <= chance + 0.03, kind


@pytest.mark.parametrize("kind", KINDS)
def test_evidence_is_where_the_object_is_seen_as_asked(kind: str) -> None:
    story, texts, evidence = asked_of(kind)
    for i, (question, answer) in enumerate(texts):
        for k, scene in enumerate(story.scenes):
            places = evidence[i, k].nonzero()[:, 0].tolist()
            assert all(scene.present[i, p] for p in places)
            if kind == "motion":
                assert places == [int(story.mover[i])]
            elif places:
                place = int(story.changed[i])
                assert places == [place]
                named = {COLORS[scene.color[i, place]], SHAPES[scene.shape[i, place]]}
                assert answer in named, question
        assert evidence[i].any()


@pytest.mark.parametrize("form, count", [(PAIR, 2), (CLIP, changes.FRAMES)])
def test_nothing_overlaps_at_any_moment(form: str, count: int) -> None:
    story, _ = new_story(form, 300, torch.Generator().manual_seed(5))
    assert len(story.scenes) == count
    for scene in story.scenes:
        boxes = scene.boxes()
        for i in range(len(scene)):
            there = [boxes[i, p].tolist() for p in range(scenes.PLACES) if scene.present[i, p]]
            for a, box in enumerate(there):
                assert 0 <= box[0] < box[2] <= scenes.SIZE and 0 <= box[1] < box[3] <= scenes.SIZE
                for other in there[:a]:
                    apart = box[0] >= other[2] or other[0] >= box[2]
                    assert apart or box[1] >= other[3] or other[1] >= box[3]
            seen = objects(scene, i)
            assert len(seen) == int(scene.present[i, : scenes.OBJECTS].sum())


@pytest.mark.parametrize("form", [PAIR, CLIP])
def test_pictures_differ_where_something_happens_and_in_noise(form: str) -> None:
    story, _ = new_story(form, 20, torch.Generator().manual_seed(6))
    images, cover = paint_all(story.scenes, pictures.load("test"), torch.Generator().manual_seed(6))
    change = (images[:, 0].float() - images[:, -1].float()).abs().amax(1)  # [B, S, S]
    places = [story.changed] if form == PAIR else [story.changed, story.mover]
    for i in range(20):
        spots = torch.stack([cover[i, k, int(p[i])] for k in (0, -1) for p in places]).amax(0) > 0
        assert change[i][spots].mean() > 20
        # noise of 3 gray levels in each picture, and not the same twice
        assert 2 < change[i][~spots].mean() < 12
        assert change[i][~spots].max() < 40


def test_a_question_about_several_pictures_has_no_single_one() -> None:
    pair, clip = examples(2, kinds=["difference", "motion"])
    assert (len(pair.images), pair.video, len(pair.boxes)) == (2, None, 2)
    assert (clip.images, len(clip.video or ()), len(clip.boxes)) == ((), 4, 4)
    for example in (pair, clip):
        with pytest.raises(OptionError, match=r"expected 1; read \.images"):
            _ = example.image
        with pytest.raises(OptionError, match="expected 1"):
            _ = example.evidence
    assert all(np.asarray(p).shape == (112, 112, 3) for p in (*pair.images, *(clip.video or ())))


def test_a_longer_list_starts_with_the_shorter() -> None:
    short, long = (examples(n, kinds=[*KINDS]) for n in (5, 12))
    for a, b in zip(short, long, strict=False):
        assert (a.question, a.answer, a.kind, a.boxes) == (b.question, b.answer, b.kind, b.boxes)
        shown = zip(a.video or a.images, b.video or b.images, strict=True)
        assert all(x.tobytes() == y.tobytes() for x, y in shown)
