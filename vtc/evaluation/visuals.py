"""The pictures and clips of questions: as a processor takes them, and as a call counts them."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from lmms_eval.protocol import ChatMessages
from PIL import Image
from torch import Tensor

from vtc.errors import UnsupportedModeError
from vtc.evaluation.measure import Numbers, evidence_numbers, last_left
from vtc.types import Selection


@dataclass(frozen=True)
class Visuals:
    """What one question shows: pictures, or clips as lists of frames; not both."""

    images: tuple[Image.Image, ...] = ()
    videos: tuple[tuple[Image.Image, ...], ...] = ()

    @property
    def shown(self) -> tuple[Image.Image, ...]:
        """All pictures or all frames."""
        return self.images or tuple(itertools.chain(*self.videos))


def visuals_of(chat: ChatMessages) -> Visuals:
    """The pictures and clips of a conversation.

    Raises:
        UnsupportedModeError: a sound, a clip that is not a list of pictures, or pictures and clips
            in one question.
    """
    images, videos, audios = chat.extract_media()
    if audios:
        raise UnsupportedModeError(
            f"model 'vtc' got a question with {len(audios)} sounds, expected pictures or clips; "
            f"choose an image task"
        )
    if images and videos:
        raise UnsupportedModeError(
            f"model 'vtc' got a question with {len(images)} pictures and {len(videos)} clips, "
            f"expected one or the other; choose another task"
        )
    for video in videos:
        frames = video if isinstance(video, (list, tuple)) else [video]
        if not all(isinstance(frame, Image.Image) for frame in frames):
            raise UnsupportedModeError(
                f"model 'vtc' got a video as {type(frames[0]).__name__}, expected a list of PIL "
                f"pictures; choose an image task, or decode the frames in doc_to_messages"
            )
    return Visuals(tuple(images), tuple(tuple(video) for video in videos))


def for_processor(asked: Sequence[Visuals]) -> dict[str, Any]:
    """Keyword arguments of a processor for the questions of one call."""
    images = [image for visuals in asked for image in visuals.images]
    videos = [list(video) for visuals in asked for video in visuals.videos]
    given = {"images": images or None, "videos": videos}
    return {name: value for name, value in given.items() if value or name == "images"}


def numbered(asked: Sequence[Visuals], counted: int) -> list[range]:
    """Which of the `counted` visuals of a call are each question's.

    A family counts a clip as one, behind all pictures of the call, or its frames as pictures.
    """
    images = sum(len(visuals.images) for visuals in asked)
    videos = sum(len(visuals.videos) for visuals in asked)
    if counted != images + videos:
        ends = itertools.accumulate((len(visuals.shown) for visuals in asked), initial=0)
        return [range(*pair) for pair in itertools.pairwise(ends)]
    found, image, video = [], 0, images
    for visuals in asked:
        if visuals.videos:
            found.append(range(video, video + len(visuals.videos)))
            video += len(visuals.videos)
        else:
            found.append(range(image, image + len(visuals.images)))
            image += len(visuals.images)
    return found


def evidence(
    doc: Mapping[str, Any], visuals: Visuals, selections: Sequence[Selection], numbers: range
) -> Numbers:
    """`evidence_numbers` of a question about any number of pictures, or one clip.

    Of several pictures, the mean over those that carry evidence.

    Args:
        doc: the question; `doc["evidence"]` has boxes, for several pictures or frames a list each.
        visuals: what it shows.
        selections: `handle.remaining` of the call that has just returned.
        numbers: the question's visuals in the call.
    """
    shown = visuals.shown
    if len(visuals.images) == 1:
        return evidence_numbers(doc, shown[0].size, selections, numbers[0])
    boxes = doc.get("evidence")
    if not isinstance(boxes, list) or len(boxes) != len(shown) or not selections:
        return {}
    if len(numbers) == len(shown):
        parts = [
            evidence_numbers({"evidence": of_one}, picture.size, selections, i)
            for of_one, picture, i in zip(boxes, shown, numbers, strict=True)
        ]
        names = dict.fromkeys(name for part in parts for name in part)
        return {name: _mean([part[name] for part in parts if name in part]) for name in names}
    return _clip_evidence(boxes, shown[0].size, selections, numbers[0]) if len(numbers) == 1 else {}


def _mean(values: Sequence[float | int | None]) -> float:
    numbers = [float(value) for value in values if value is not None]
    return sum(numbers) / len(numbers)


def _clip_evidence(
    boxes: Sequence[Any], size: tuple[int, int], selections: Sequence[Selection], number: int
) -> Numbers:
    """Of a clip that is one visual of several temporal grids, each made of some frames."""
    from vtc.testbed import evidence_tokens

    if (left := last_left(selections, number)) is None:
        return {}
    selection, group = left
    grids, height, width = selection.grid[group]
    if selection.lengths[group] != grids * height * width or len(boxes) % grids:
        return {}
    each = len(boxes) // grids
    wanted = torch.cat(
        [
            evidence_tokens(list(itertools.chain(*boxes[at : at + each])), (height, width), size)
            for at in range(0, len(boxes), each)
        ]
    )
    found: Numbers = {}
    if bool(wanted.any()):
        if bool(selection.valid[group].any()):
            found["evidence_recall"] = _share(selection.mask()[group], wanted)
        if selection.merge is not None:
            found["evidence_covered"] = _share(selection.covered()[group], wanted)
    return found


def _share(mask: Tensor, wanted: Tensor) -> float:
    return int((mask.cpu()[: len(wanted)] & wanted).sum()) / int(wanted.sum())
