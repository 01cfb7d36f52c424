"""What a picture of a selection must show, on grids and pictures of awkward sizes."""

import math
from itertools import pairwise

import numpy as np
import pytest
import torch
from PIL import Image

import vtc
from vtc import viz
from vtc.errors import InputError
from vtc.types import Budget, Selection, Tokens

GRIDS = [(14, 14), (7, 9), (1, 5), (24, 24)]


def picture(width, height, seed=0):
    noise = np.random.default_rng(seed).integers(40, 216, (height, width, 3), dtype=np.uint8)
    noise[..., 0] |= 128  # colorful, so that gray differs from it
    noise[..., 2] &= 63
    return Image.fromarray(noise)


def tokens(h, w, t=1):
    n = t * h * w
    rows = torch.randperm(n, generator=torch.Generator().manual_seed(n))[None, None] + n
    return Tokens(
        features=torch.zeros(1, n, 4),
        valid=torch.ones(1, n, dtype=torch.bool),
        grid=((t, h, w),),
        parent=torch.zeros(1, 2, dtype=torch.int64),
        signals={"cls_row": rows / n, "image_key": torch.tensor([3])},
    )


def selected(method, h, w, keep=0.3, t=1):
    return vtc.method(method).select(tokens(h, w, t), Budget.of(keep))


def cells(image, h, w):
    """The inside of every cell, without its border lines: `[h·w]` arrays of pixels."""
    pixels = np.asarray(image, dtype=float)
    ys = pairwise(math.ceil(i * image.height / h) for i in range(h + 1))
    xs = list(pairwise(math.ceil(j * image.width / w) for j in range(w + 1)))
    return [pixels[y0 + 1 : y1, x0 + 1 : x1] for y0, y1 in ys for x0, x1 in xs]


@pytest.mark.parametrize("grid", GRIDS, ids=str)
@pytest.mark.parametrize("size", [(112, 112), (63, 45), (1200, 701)], ids=str)
def test_kept_cells_are_unchanged_and_dropped_ones_are_dark_gray(grid, size):
    image, selection = picture(*size), selected("vtc_cls", *grid)
    drawn = viz.overlay(image, selection)
    factor = drawn.width // image.width
    assert drawn.size == (image.width * factor, image.height * factor)
    enlarged = image.resize(drawn.size, Image.Resampling.NEAREST)
    both = zip(cells(drawn, *grid), cells(enlarged, *grid), strict=True)
    for kept, (shown, original) in zip(selection.mask()[0].tolist(), both, strict=True):
        if kept:
            assert (shown == original).all()
        else:
            assert np.ptp(shown, axis=-1).max() == 0
            assert shown.mean() < 0.6 * np.dot(original, (0.299, 0.587, 0.114)).mean()


def test_small_pictures_are_enlarged_and_large_ones_are_not():
    selection = selected("uniform", 7, 7)
    assert viz.overlay(picture(112, 112), selection).size == (560, 560)
    assert viz.overlay(picture(900, 640), selection).size == (900, 640)


def test_members_of_one_slot_share_a_tint_and_slots_differ():
    selection = selected("average_pool", 12, 12, keep=9)
    drawn = viz.overlay(Image.new("RGB", (120, 120), (128, 128, 128)), selection)
    slots = dict(zip(selection.merge[1][0].tolist(), selection.merge[0][0].tolist(), strict=True))
    inside = cells(drawn, 12, 12)
    colors = {}
    for token, slot in slots.items():
        colors.setdefault(slot, set()).add(tuple(inside[token].reshape(-1, 3).mean(0)))
    assert len(colors) == 9
    assert all(len(shades) == 1 for shades in colors.values())
    assert len(set.union(*colors.values())) == 9


def test_evidence_is_outlined_where_it_is_and_nowhere_else():
    image, selection = Image.new("RGB", (112, 112), (128, 128, 128)), selected("uniform", 14, 14)
    plain = np.asarray(viz.overlay(image, selection)).astype(int)
    boxed = np.asarray(viz.overlay(image, selection, evidence=[(16, 24, 48, 40)])).astype(int)
    ys, xs = np.nonzero((plain != boxed).any(-1))
    assert (xs.min(), xs.max() + 1, ys.min(), ys.max() + 1) == (80, 240, 120, 200)
    assert (plain == boxed)[125:195, 85:235].all()


def test_score_map_is_brighter_where_scores_are_higher():
    grid = (5, 6)
    selection = selected("vtc_cls", *grid)
    drawn = viz.score_map(Image.new("RGB", (60, 50), (128, 128, 128)), selection)
    light = torch.tensor([float(c.sum(-1).mean()) for c in cells(drawn, *grid)])
    assert torch.equal(light.argsort(), selection.scores[0].argsort())


def test_sinks_are_in_color_and_brighter_the_more_layers_they_are_sinks_in():
    h, w = 4, 5
    counts = [0] * (h * w)
    counts[3], counts[7], counts[12] = 1, 4, 2
    drawn = viz.sink_map(
        Image.new("RGB", (50, 40), (128, 128, 128)), selected("uniform", h, w), counts
    )
    colors = [c.reshape(-1, 3).mean(0) for c in cells(drawn, h, w)]
    colored = [i for i, color in enumerate(colors) if np.ptp(color) > 1]
    assert colored == [3, 7, 12]
    assert colors[3].sum() < colors[12].sum() < colors[7].sum()


def test_one_below_other_holds_every_picture_whole():
    pictures = [Image.new("RGB", (50, 100), "red"), Image.new("RGB", (80, 80), "blue")]
    sheet = np.asarray(viz.one_below_other(pictures, ["a", "b"]))
    red, blue = ((sheet == color).all(-1) for color in ((255, 0, 0), (0, 0, 255)))
    assert red.sum() == 50 * 100 and blue.sum() == 80 * 80
    assert np.nonzero(red)[0].max() < np.nonzero(blue)[0].min()


def test_each_frame_of_a_video_has_its_own_picture():
    selection, image = selected("random", 6, 6, t=3), picture(60, 60)
    frames = [viz.overlay(image, selection, frame=f).tobytes() for f in range(3)]
    assert len(set(frames)) == 3


def test_as_seen_is_what_the_processor_shows_the_model():
    from transformers import CLIPImageProcessor

    size = {"height": 56, "width": 56}
    processor = CLIPImageProcessor(size={"shortest_edge": 56}, crop_size=size)
    seen = viz.as_seen(picture(168, 112), processor)
    assert seen.size == (56, 56)
    pixels = processor(images=picture(168, 112), return_tensors="np")["pixel_values"][0]
    mean, std = np.array(processor.image_mean), np.array(processor.image_std)
    wanted = (pixels.transpose(1, 2, 0) * std + mean) * 255
    assert np.abs(np.asarray(seen) - wanted).max() <= 1


def test_side_by_side_holds_every_picture_whole():
    pictures = [Image.new("RGB", (50, 100), "red"), Image.new("RGB", (80, 80), "blue")]
    sheet = np.asarray(viz.side_by_side(pictures, ["a", "b"]))
    red = (sheet == (255, 0, 0)).all(-1)
    blue = (sheet == (0, 0, 255)).all(-1)
    assert red.sum() == 50 * 100 and blue.sum() == 100 * 100


@pytest.mark.parametrize(
    ("draw", "message"),
    [
        (lambda s: viz.overlay(picture(9, 9), s, group=1), r"group=1 .* expected 0\.\.0"),
        (lambda s: viz.overlay(picture(9, 9), s, group=-1), r"group=-1 .* expected 0\.\.0"),
        (lambda s: viz.overlay(picture(9, 9), s, frame=2), r"frame=2 .* expected 0\.\.0"),
        (lambda s: viz.score_map(picture(9, 9), s), r"no scores, expected one per token"),
        (lambda s: viz.sink_map(picture(9, 9), s, [0, 1]), r"counts of 2 tokens .* expected 9"),
        (lambda s: viz.side_by_side([], []), r"got 0 pictures"),
        (lambda s: viz.one_below_other([], []), r"got 0 pictures"),
        (lambda s: viz.side_by_side([picture(9, 9)], []), r"1 pictures and 0 titles"),
    ],
)
def test_wrong_uses_say_what_was_expected(draw, message):
    with pytest.raises(InputError, match=message):
        draw(selected("uniform", 3, 3))


def test_a_ragged_grid_is_refused():
    whole = selected("uniform", 3, 3)
    ragged = Selection(whole.keep, whole.valid, (8,), whole.parent, whole.grid)
    with pytest.raises(InputError, match=r"8 tokens on a grid \(1, 3, 3\), expected 9"):
        viz.overlay(picture(9, 9), ragged)
