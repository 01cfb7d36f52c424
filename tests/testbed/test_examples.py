"""Questions as pictures and text: repeatable, balanced, no overlap of splits, evidence in place."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
import torch

from vtc.errors import OptionError
from vtc.testbed import KINDS, evidence_tokens, examples, pictures, scenes
from vtc.testbed.render import paint

# a block of questions is drawn for each kind
SOME = ("color", "count", "digit")


def test_the_same_call_gives_the_same_questions_and_a_longer_one_starts_with_them() -> None:
    short, long = examples(9, kinds=SOME), examples(150, kinds=SOME)
    for a, b in zip(short, long, strict=False):
        assert (a.question, a.answer, a.kind, a.evidence) == (
            b.question,
            b.answer,
            b.kind,
            b.evidence,
        )
        assert a.image.tobytes() == b.image.tobytes()


def test_pictures_do_not_depend_on_threads() -> None:
    before, found = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            found.append([example.image.tobytes() for example in examples(30, kinds=SOME)])
            assert torch.get_num_threads() == threads
    finally:
        torch.set_num_threads(before)
    assert found[0] == found[1] == found[2]


def test_seeds_and_splits_give_other_scenes() -> None:
    found = [examples(90, split, seed, SOME) for split in pictures.SPLITS for seed in (0, 1)]
    drawn = [example.image.tobytes() for part in found for example in part]
    assert len(set(drawn)) == len(drawn)


@pytest.mark.parametrize("what", ["tiles", "hand"])
def test_splits_share_no_background_and_no_handwriting(what: str) -> None:
    seen: dict[bytes, str] = {}
    for split in pictures.SPLITS:
        assets = pictures.load(split)
        if what == "tiles":
            own = [tile.numpy().tobytes() for tile in assets.tiles]
        else:
            own = [
                assets.hand[digit, i].numpy().tobytes()
                for digit in range(10)
                for i in range(int(assets.hand_count[digit]))
            ]
        assert len(own) >= 8
        for key in own:
            assert seen.setdefault(key, split) == split


def test_without_the_picture_nobody_beats_chance(unpainted: None) -> None:
    """The best that can be said given the words alone, even knowing this very test set."""
    found = examples(2000)
    for kind, chance in KINDS.items():
        answers: dict[str, Counter[str]] = {}
        for example in found:
            if example.kind == kind:
                answers.setdefault(example.question, Counter())[example.answer] += 1
        right = sum(counter.most_common(1)[0][1] for counter in answers.values())
        assert right / sum(c.total() for c in answers.values()) <= chance + 0.03, kind


def test_kinds_take_turns(unpainted: None) -> None:
    assert [e.kind for e in examples(17)] == [*KINDS, *KINDS, "existence"]
    assert {e.kind for e in examples(9, kinds=["caption", "count"])} == {"caption", "count"}


@pytest.mark.parametrize("bad", [{"kinds": ["hue"]}, {"count": -1}, {"split": "dev"}])
def test_wrong_use(bad: dict) -> None:
    with pytest.raises(OptionError, match="expected"):
        examples(**{"count": 3, **bad})


def test_boxes_hold_what_is_painted() -> None:
    scene = scenes.sample(scenes.uniforms(60, torch.Generator().manual_seed(3)))
    _, cover = paint(scene, pictures.load("test"), torch.Generator().manual_seed(3))
    boxes = scene.boxes()
    for i in range(len(scene)):
        for place in scene.present[i].nonzero()[:, 0].tolist():
            x0, y0, x1, y1 = boxes[i, place].tolist()
            painted = cover[i, place]
            # turned corners may stick out by a little
            assert painted[y0:y1, x0:x1].sum() >= 0.9 * painted.sum() > 0
            assert painted[y0:y1, x0:x1].mean() > 0.25


def test_evidence_stands_out_from_the_picture() -> None:
    """The question's box really shows something: painting the scene without it changes its pixels
    there and nowhere else."""
    u = scenes.uniforms(40, torch.Generator().manual_seed(8))
    scene = scenes.sample(u, need_number=True)
    gone = scene.replace(present=scene.present.clone())
    gone.present[:, scenes.NUMBER_PLACE] = False
    images = [
        paint(s, pictures.load("test"), torch.Generator().manual_seed(1))[0].float()
        for s in (scene, gone)
    ]
    changed = (images[0] - images[1]).abs().amax(1) > 12
    for i, box in enumerate(scene.boxes()[:, scenes.NUMBER_PLACE].tolist()):
        x0, y0, x1, y1 = box
        inside = changed[i, y0:y1, x0:x1]
        assert inside.float().mean() > 0.2
        assert int(changed[i].sum()) - int(inside.sum()) < 0.1 * int(inside.sum())


@pytest.mark.parametrize(
    "box, tokens",
    [
        ((0, 0, 8, 8), [0]),
        ((8, 0, 24, 8), [1, 2]),
        # a sixteenth of the second column: not evidence
        ((0, 0, 8.5, 8), [0]),
        # a fifth of it is
        ((0, 0, 9.6, 8), [0, 1]),
        ((4, 4, 12, 12), [0, 1, 14, 15]),
        # too small for a fifth of any cell: the one it covers most
        ((7, 7, 9.5, 8), [1]),
        ((104, 104, 112, 112), [195]),
    ],
)
def test_evidence_tokens(box: tuple[float, ...], tokens: list[int]) -> None:
    found = evidence_tokens([box], (14, 14), (112, 112))
    assert found.nonzero()[:, 0].tolist() == tokens


def test_evidence_tokens_follow_grid_and_picture() -> None:
    # a wide picture, 2×4 tokens: the right half of the lower row
    found = evidence_tokens([(400, 100, 800, 200), (0, 0, 200, 100)], (2, 4), (800, 200))
    assert np.flatnonzero(found.numpy()).tolist() == [0, 6, 7]
    assert not evidence_tokens([], (2, 4), (800, 200)).any()
