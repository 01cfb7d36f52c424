"""Training batches, made on the device: new scenes, pictures of them, questions as token ids."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from vtc.testbed import changes, scenes
from vtc.testbed import questions as q
from vtc.testbed.packing import CLIP, PAIR, PHRASINGS, PICTURE, SLOTS, targets_of
from vtc.testbed.pictures import Pictures
from vtc.testbed.render import paint, paint_all
from vtc.testbed.tokens import PAD_TARGET, QuestionTokens, Slot
from vtc.testbed.vocabulary import CAPTION

# edge of the cells that `patches` describes, in pixels: a token's, in every family
CELL = 8
IMAGE_TOKENS = (scenes.SIZE // CELL) ** 2
# values of one cell: color, shape, tens, ones, handwritten digit; 0 = none
CELL_CLASSES = (9, 9, 11, 11, 11)
LABELS = 8 + 8 + 64 + 10 + 10 + 10


@dataclass
class Part:
    """Questions about pictures of one form. N is the length of all slots, n of all targets."""

    images: Tensor  # uint8 [B, V, 3, h, w]
    ids: Tensor  # long [B, N], every slot in the order of the packing
    at: Tensor  # long [B, n], output positions among the N
    targets: Tensor  # long [B, n]

    def to(self, device: torch.device) -> Part:
        """The same on another device."""
        return Part(*(value.to(device) for value in vars(self).values()))


@dataclass
class Batch:
    """What one training step reads."""

    parts: dict[str, Part]  # by form
    labels: Tensor  # float [B, LABELS], what each single picture shows
    patches: Tensor  # long [B, 5, IMAGE_TOKENS], what each of its cells shows

    def to(self, device: torch.device) -> Batch:
        """The same on another device."""
        parts = {form: part.to(device) for form, part in self.parts.items()}
        return Batch(parts, self.labels.to(device), self.patches.to(device))


def image_labels(scene: scenes.Scene) -> Tensor:
    """Which colors, shapes, pairs and digits are in the picture, float [B, LABELS]."""
    filled = scene.present[:, : scenes.OBJECTS, None]
    number = scene.present[:, scenes.NUMBER_PLACE, None]
    digit = scene.present[:, scenes.DIGIT_PLACE, None]
    parts = [
        (F.one_hot(scene.color, 8) * filled).amax(1),
        (F.one_hot(scene.shape, 8) * filled).amax(1),
        (F.one_hot(scene.color * 8 + scene.shape, 64) * filled).amax(1),
        F.one_hot(scene.number // 10, 10) * number,
        F.one_hot(scene.number % 10, 10) * number,
        F.one_hot(scene.digit, 10) * digit,
    ]
    return torch.cat(parts, 1).float()


def patch_values(scene: scenes.Scene, cover: Tensor) -> Tensor:
    """What each cell shows, if a place covers a fifth of it: long [B, 5, IMAGE_TOKENS]."""
    share, place = F.avg_pool2d(cover, CELL).flatten(2).max(1)  # [B, T]
    none = torch.zeros_like(scene.number)[:, None]

    def value(objects: Tensor, number: Tensor, digit: Tensor) -> Tensor:
        table = torch.cat([objects, number[:, None], digit[:, None]], 1)  # [B, P]
        return table.gather(1, place) * (share > 0.2)

    nothing = none.expand(-1, scenes.OBJECTS)
    zero = none[:, 0]
    return torch.stack(
        [
            value(scene.color + 1, zero, zero),
            value(scene.shape + 1, zero, zero),
            value(nothing, scene.number // 10 + 1, zero),
            value(nothing, scene.number % 10 + 1, zero),
            value(nothing, zero, scene.digit + 1),
        ],
        1,
    )


def make_batch(
    sizes: Mapping[str, int], tokens: QuestionTokens, pictures: Pictures, generator: torch.Generator
) -> Batch:
    """New scenes, so many of each form, single pictures among them; a question for each slot."""
    size = sizes[PICTURE]
    scene = scenes.sample(scenes.uniforms(size, generator))
    images, cover = paint(scene, pictures, generator)
    parts = {PICTURE: _packed(images[:, None], _asked(scene, tokens), tokens)}
    for form in (PAIR, CLIP):
        if sizes.get(form):
            parts[form] = _story_part(form, sizes[form], tokens, pictures, generator)
    return Batch(parts, image_labels(scene), patch_values(scene, cover))


def make_resized(
    size: int,
    to: tuple[int, int],
    tokens: QuestionTokens,
    pictures: Pictures,
    generator: torch.Generator,
) -> Part:
    """Single pictures made smaller, to (height, width), with the questions of full ones."""
    scene = scenes.sample(scenes.uniforms(size, generator))
    images, _ = paint(scene, pictures, generator)
    small = F.interpolate(images.float(), to, mode="bicubic", antialias=True)
    images = small.clamp(0, 255).round().to(torch.uint8)
    return _packed(images[:, None], _asked(scene, tokens), tokens)


def _asked(scene: scenes.Scene, tokens: QuestionTokens) -> list[Slot]:
    """A slot of every kind of question about single pictures."""
    slots = []
    for kind in SLOTS[PICTURE]:
        if kind == CAPTION:
            colors, shapes, valid = q.caption(scene)
            slot = tokens.encode_caption(colors, shapes)
        else:
            slot = tokens.encode(kind, q.ask(scene, kind))
            valid = _answerable(scene, kind)
        targets = slot.targets.masked_fill(~valid[:, None], PAD_TARGET)
        slots.append(Slot(slot.ids, slot.at, targets))
    return slots


def _answerable(scene: scenes.Scene, kind: str) -> Tensor:
    places = {"number": scenes.NUMBER_PLACE, "digit": scenes.DIGIT_PLACE}
    return scene.present[:, places.get(kind, 0)]


def _story_part(
    form: str, size: int, tokens: QuestionTokens, pictures: Pictures, generator: torch.Generator
) -> Part:
    story, more = new_story(form, size, generator)
    images, _ = paint_all(story.scenes, pictures, generator)
    slots = []
    for kind, phrasing in zip(SLOTS[form], PHRASINGS[form], strict=True):
        template = changes.template(kind, more)
        if phrasing is not None:
            template = torch.full_like(template, phrasing)
        slots.append(tokens.encode(kind, changes.ask(story, kind, template)))
    return _packed(images, slots, tokens)


def new_story(form: str, size: int, generator: torch.Generator) -> tuple[changes.Story, Tensor]:
    """Stories of new scenes, and their random numbers."""
    scene = scenes.sample(scenes.uniforms(size, generator))
    more = changes.uniforms(size, generator)
    if form == PAIR:
        return changes.pair(scene, more), more
    return changes.clip(scene, more, *changes.move(scene, more)), more


def _packed(images: Tensor, slots: list[Slot], tokens: QuestionTokens) -> Part:
    """The slots one behind the other."""
    at, start = [], 0
    for slot in slots:
        at.append(slot.at + start)
        start += slot.ids.shape[1]
    return Part(
        images,
        torch.cat([slot.ids for slot in slots], 1),
        torch.cat(at, 1),
        torch.cat([slot.targets for slot in slots], 1),
    )


def kind_hits(form: str, hit: Tensor, targets: Tensor) -> dict[str, tuple[int, int]]:
    """Right answers and answerable questions of every kind, from `hit` [B, n]."""
    result: dict[str, tuple[int, int]] = {}
    start = 0
    for kind in SLOTS[form]:
        width = targets_of(kind)
        asked = targets[:, start] != PAD_TARGET
        right = hit[:, start : start + width].all(-1) & asked
        before = result.get(kind, (0, 0))
        result[kind] = (before[0] + int(right.sum()), before[1] + int(asked.sum()))
        start += width
    return result
