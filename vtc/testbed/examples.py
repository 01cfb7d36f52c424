"""Questions about scenes as people and processors see them: a picture, a text, an answer, boxes.

A scene is drawn on the CPU from its split, seed, kind and number, so that the same call gives the
same pictures anywhere and a longer list starts with the shorter one.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from vtc.errors import OptionError
from vtc.testbed import pictures, scenes
from vtc.testbed.balance import balanced
from vtc.testbed.questions import ALL_KINDS, Questions, caption
from vtc.testbed.render import paint
from vtc.testbed.vocabulary import CAPTION, COLORS, KIND_NAMES, SHAPES, TEMPLATES, answer_text
from vtc.testbed.vocabulary import phrase as phrased

# scenes drawn at once: a multiple of every group of balanced answers
BLOCK = 40
# a token carries evidence if a box covers so much of its cell
COVERED = 0.2
Box = tuple[int, int, int, int]


@dataclass(frozen=True)
class Example:
    """One question.

    Attributes:
        image: RGB, 112×112.
        question: as asked, without a chat template.
        answer: one word, a number of two digits, or a caption.
        kind: one of `KINDS`, or `"caption"`.
        evidence: boxes (x0, y0, x1, y1) in pixels of what carries the answer; none where nothing
            does (a shape that is not there).
    """

    image: Image.Image
    question: str
    answer: str
    kind: str
    evidence: tuple[Box, ...]


def examples(
    count: int, split: str = "test", seed: int = 0, kinds: Sequence[str] = KIND_NAMES
) -> list[Example]:
    """The first `count` questions of a split, the kinds taking turns.

    Answers are balanced: within each group of questions that share their words, every answer is
    right once, so without the picture nobody is right more often than chance.

    Args:
        count: how many.
        split: `"train"`, `"validation"` or `"test"`: no photograph's cut, no handwritten sample and
            no scene is in two of them.
        seed: another seed gives other scenes of the same split.
        kinds: kinds of question, of `KINDS` and `"caption"`.

    Raises:
        OptionError: no such split or kind, or a negative count.
    """
    if unknown := [kind for kind in kinds if kind not in ALL_KINDS]:
        raise OptionError(f"kinds: got {unknown[0]!r}, expected some of {', '.join(ALL_KINDS)}")
    if count < 0 or not kinds:
        raise OptionError(f"got count={count} and {len(kinds)} kinds, expected at least 0 and 1")
    streams = [_stream(kind, split, seed) for kind in kinds]
    return [next(streams[i % len(kinds)]) for i in range(count)]


def _stream(kind: str, split: str, seed: int) -> Iterator[Example]:
    block = 0
    while True:
        with _one_thread():
            found = _block(kind, split, seed, block)
        yield from found
        block += 1


@contextmanager
def _one_thread() -> Iterator[None]:
    """Where threads divide a tensor, vectors end, and a pixel may come out another by one."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _block(kind: str, split: str, seed: int, block: int) -> list[Example]:
    digest = hashlib.sha256(f"{split} {seed} {kind} {block}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)
    u = scenes.uniforms(BLOCK, generator)
    if kind == CAPTION:
        return _captions(scenes.sample(u), split, generator)
    scene, asked = balanced(kind, u)
    images = _images(scene, split, generator)
    boxes, texts = scene.boxes(), _texts(kind, asked)
    return [
        Example(image, question, answer, kind, _as_boxes(boxes[i][asked.evidence[i]]))
        for i, (image, (question, answer)) in enumerate(zip(images, texts, strict=True))
    ]


def _captions(scene: scenes.Scene, split: str, generator: torch.Generator) -> list[Example]:
    """Scenes in which the order from left to right is beyond doubt."""
    colors, shapes, clear = caption(scene)
    images = _images(scene, split, generator)
    boxes, filled = scene.boxes(), scene.present.clone()
    filled[:, scenes.OBJECTS :] = False
    found = []
    for i in clear.nonzero()[:, 0].tolist():
        pairs = zip(colors[i].tolist(), shapes[i].tolist(), strict=True)
        answer = ", ".join(f"{COLORS[c]} {SHAPES[s]}" for c, s in pairs if c >= 0)
        boxed = _as_boxes(boxes[i][filled[i]])
        found.append(Example(images[i], TEMPLATES[CAPTION][0], answer, CAPTION, boxed))
    return found


def _images(scene: scenes.Scene, split: str, generator: torch.Generator) -> list[Image.Image]:
    pixels, _ = paint(scene, pictures.load(split), generator)
    return [Image.fromarray(p) for p in np.ascontiguousarray(pixels.permute(0, 2, 3, 1).numpy())]


def _texts(kind: str, asked: Questions) -> Iterator[tuple[str, str]]:
    for template, fillers, answer in zip(
        asked.template.tolist(), asked.fillers.tolist(), asked.answer.tolist(), strict=True
    ):
        yield phrased(kind, template, tuple(fillers)), answer_text(tuple(answer))


def _as_boxes(boxes: Tensor) -> tuple[Box, ...]:
    return tuple((x0, y0, x1, y1) for x0, y0, x1, y1 in boxes.tolist())


def evidence_tokens(
    boxes: Sequence[Sequence[float]], grid: tuple[int, int], size: tuple[int, int]
) -> Tensor:
    """Which tokens carry the answer: those whose cell a box covers by a fifth or more.

    A box too small for that in any cell takes the cell it covers most.

    Args:
        boxes: (x0, y0, x1, y1) in pixels.
        grid: (h, w) in tokens.
        size: (width, height) of the picture in pixels.

    Returns:
        `bool[h·w]`, row by row.
    """
    h, w = grid
    found = torch.zeros(h * w, dtype=torch.bool)
    for x0, y0, x1, y1 in boxes:
        rows = _covered(y0 * h / size[1], y1 * h / size[1], h)
        columns = _covered(x0 * w / size[0], x1 * w / size[0], w)
        share = (rows[:, None] * columns).flatten()
        least = min(COVERED, float(share.max()))
        # in floating point a fifth may come out a hair below
        found |= (share >= least - 1e-9) & (share > 0)
    return found


def _covered(start: float, end: float, cells: int) -> Tensor:
    """The share of each of `cells` unit cells that [start, end] covers."""
    edge = torch.arange(cells, dtype=torch.float64)
    return (torch.clamp(edge + 1, max=end) - torch.clamp(edge, min=start)).clamp_min(0)
