"""Questions about scenes as people and processors see them: a picture, a text, an answer, boxes.

A scene is drawn on the CPU from its split, seed, kind and number, so that the same call gives the
same pictures anywhere and a longer list starts with the shorter one.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from vtc.errors import OptionError
from vtc.testbed import changes, pictures, scenes
from vtc.testbed.balance import balanced, balanced_story
from vtc.testbed.questions import ALL_KINDS, Questions, caption
from vtc.testbed.render import paint, paint_all
from vtc.testbed.vocabulary import (
    CAPTION,
    CLIP_KINDS,
    COLORS,
    KIND_NAMES,
    PAIR_KINDS,
    SHAPES,
    TEMPLATES,
    answer_text,
)
from vtc.testbed.vocabulary import phrase as phrased

# scenes drawn at once: a multiple of every group of balanced answers
BLOCK = 40
# a token carries evidence if a box covers so much of its cell
COVERED = 0.2
Box = tuple[int, int, int, int]
T = TypeVar("T")


@dataclass(frozen=True)
class Example:
    """One question.

    Attributes:
        images: RGB, 112×112: one, or the two of a pair; none for a clip.
        question: as asked, without a chat template.
        answer: one word, a number of two digits, or a caption.
        kind: one of `KINDS`, `PAIR_KINDS` or `CLIP_KINDS`, or `"caption"`.
        boxes: for each picture or frame, boxes (x0, y0, x1, y1) in pixels of what carries the
            answer; none where nothing does (a shape that is not there).
        video: the frames of a clip, in order.
    """

    images: tuple[Image.Image, ...]
    question: str
    answer: str
    kind: str
    boxes: tuple[tuple[Box, ...], ...]
    video: tuple[Image.Image, ...] | None = None

    @property
    def image(self) -> Image.Image:
        """The picture of a question about one."""
        return self._one(self.images)

    @property
    def evidence(self) -> tuple[Box, ...]:
        """The boxes in the picture of a question about one."""
        return self._one(self.boxes)

    def _one(self, found: tuple[T, ...]) -> T:
        if len(found) != 1:
            raise OptionError(
                f"a question of kind {self.kind!r} has {len(self.boxes)} pictures, expected 1; "
                f"read .images, .video and .boxes"
            )
        return found[0]


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
        kinds: kinds of question, of `KINDS`, `"caption"`, `PAIR_KINDS` and `CLIP_KINDS`. The
            `llava` model knows those about one picture.

    Raises:
        OptionError: no such split or kind, or a negative count.
    """
    known = (*ALL_KINDS, *PAIR_KINDS, *CLIP_KINDS)
    if unknown := [kind for kind in kinds if kind not in known]:
        raise OptionError(f"kinds: got {unknown[0]!r}, expected some of {', '.join(known)}")
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
    if kind not in KIND_NAMES:
        return _stories(kind, u, split, generator)
    scene, asked = balanced(kind, u)
    images = _images(scene, split, generator)
    boxes, texts = scene.boxes(), _texts(kind, asked)
    return [
        Example((image,), question, answer, kind, (_as_boxes(boxes[i][asked.evidence[i]]),))
        for i, (image, (question, answer)) in enumerate(zip(images, texts, strict=True))
    ]


def _stories(kind: str, u: Tensor, split: str, generator: torch.Generator) -> list[Example]:
    """Questions about pairs and clips."""
    story, asked = balanced_story(kind, u, changes.uniforms(BLOCK, generator))
    pixels, _ = paint_all(story.scenes, pictures.load(split), generator)
    boxes = [scene.boxes() for scene in story.scenes]
    found = []
    for i, (question, answer) in enumerate(_texts(kind, asked)):
        shown = tuple(_as_images(pixels[i]))
        evidence = tuple(
            _as_boxes(of_all[i][places])
            for of_all, places in zip(boxes, asked.evidence[i], strict=True)
        )
        is_clip = kind in CLIP_KINDS
        images, video = ((), shown) if is_clip else (shown, None)
        found.append(Example(images, question, answer, kind, evidence, video))
    return found


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
        found.append(Example((images[i],), TEMPLATES[CAPTION][0], answer, CAPTION, (boxed,)))
    return found


def _images(scene: scenes.Scene, split: str, generator: torch.Generator) -> list[Image.Image]:
    pixels, _ = paint(scene, pictures.load(split), generator)
    return _as_images(pixels)


def _as_images(pixels: Tensor) -> list[Image.Image]:
    """Pictures of uint8 [V, 3, S, S]."""
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
