"""Scenes of the testbed one by one, with what can be asked about each."""

from __future__ import annotations

import hashlib
import io
import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from PIL import Image

from vtc.testbed import pictures, scenes
from vtc.testbed.examples import BLOCK
from vtc.testbed.examples import _one_thread as one_thread
from vtc.testbed.questions import ask, relation_gap, relation_pair
from vtc.testbed.render import paint
from vtc.testbed.scenes import OBJECTS, Scene
from vtc.testbed.vocabulary import answer_text, phrase

Pair = tuple[int, int]  # color and shape
_EXISTENCE, _RELATION = (0, 1), ((0, 1), (2, 3))


@dataclass(frozen=True)
class Drawn:
    """One scene: its picture, the objects in it and its number."""

    index: int
    image: dict[str, Any]
    objects: tuple[Pair, ...]
    scene: Scene


class Scenes:
    """Scenes of the test split without end, each with a card; all data sets show the same ones."""

    def __init__(self) -> None:
        self._drawn: list[Drawn] = []

    def __iter__(self) -> Iterator[Drawn]:
        for i in itertools.count():
            while i >= len(self._drawn):
                self._draw()
            yield self._drawn[i]

    def _draw(self) -> None:
        start = len(self._drawn)
        digest = hashlib.sha256(f"stock {start}".encode()).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)
        with one_thread():
            scene = scenes.sample(scenes.uniforms(BLOCK, generator), need_number=True)
            pixels, _ = paint(scene, pictures.load("test"), generator)
        for i in range(BLOCK):
            one = Image.fromarray(pixels[i].permute(1, 2, 0).contiguous().numpy())
            self._drawn.append(Drawn(start + i, _png(one), _objects(scene, i), _row(scene, i)))


def _row(scene: Scene, i: int) -> Scene:
    """One scene of a batch, as a batch of one."""
    return Scene(**{name: value[i : i + 1] for name, value in vars(scene).items()})


def _objects(scene: Scene, i: int) -> tuple[Pair, ...]:
    there = scene.present[i, :OBJECTS].tolist()
    pairs = zip(scene.color[i].tolist(), scene.shape[i].tolist(), strict=True)
    return tuple(pair for pair, is_there in zip(pairs, there, strict=True) if is_there)


def absent(objects: Sequence[Pair]) -> dict[str, list[Pair]]:
    """Colors with shapes that no object has, by POPE's categories."""
    colors, shapes = ({pair[i] for pair in objects} for i in (0, 1))
    every = [(c, s) for c in range(8) for s in range(8) if (c, s) not in objects]
    return {
        "random": [(c, s) for c, s in every if c not in colors and s not in shapes],
        "popular": [(c, s) for c, s in every if c not in colors and s in shapes],
        "adversarial": [(c, s) for c, s in every if c in colors and s in shapes],
    }


def is_there(what: Pair, turn: int) -> str:
    """A question of yes or no, phrased in one of two ways."""
    return phrase("existence", _EXISTENCE[turn % 2], (*what, 0, 0))


def relations(drawn: Drawn) -> tuple[str, str]:
    """What is true and what is false of two objects, along the axis on which they are apart."""
    one, two = (drawn.objects[int(place)] for place in relation_pair(drawn.scene))
    gap = relation_gap(drawn.scene)[0].tolist()
    vertical = abs(gap[1]) > abs(gap[0])
    before, after = _RELATION[vertical]
    true, false = (after, before) if gap[vertical] > 0 else (before, after)
    return phrase("relation", true, (*one, *two)), phrase("relation", false, (*one, *two))


def asked(drawn: Drawn, kind: str) -> tuple[str, str]:
    """A question of the testbed about one scene, and its answer."""
    asked = ask(drawn.scene, kind)
    c, s, d, t = asked.fillers[0].tolist()
    question = phrase(kind, int(asked.template), (c, s, d, t))
    return question, answer_text(tuple(asked.answer[0].tolist()))


def _png(picture: Image.Image) -> dict[str, Any]:
    """As datasets stores a picture."""
    buffer = io.BytesIO()
    picture.save(buffer, "PNG")
    return {"bytes": buffer.getvalue(), "path": None}
