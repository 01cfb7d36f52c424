"""The picture of a plan: a column per layer, blue where visual rows work, gray where they skip."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from vtc.errors import InputError
from vtc.layer_chart import layer_chart
from vtc.plans import LayerPlan, LayerRule

BLUE, GRAY, IDLE = (0, 114, 178), (228, 228, 228), (154, 154, 154)


def skipping(layers, depth, scores=None, **rule):
    return LayerPlan.skipping(layers, depth, LayerRule(**rule), scores)


def columns(image, depth, rows, row=0):
    """Where the cells of a row begin: x of each, and their y."""
    pixels = np.asarray(image)
    y = pixels.shape[0] - 24 - (rows - row) * 29 + 6
    xs = np.flatnonzero((pixels[y] == BLUE).all(-1) | (pixels[y] == GRAY).all(-1))
    starts = xs[np.flatnonzero(np.diff(xs, prepend=-2) > 1)]
    assert len(starts) == depth
    return starts.tolist(), y


def blue_cells(image, depth, row, rows):
    """Which cells of a row are blue."""
    starts, y = columns(image, depth, rows, row)
    return [bool((np.asarray(image)[y, x] == BLUE).all()) for x in starts]


@pytest.mark.parametrize("depth", [1, 6, 33, 80])
@pytest.mark.parametrize(
    "rule", [{"attention": False}, {"ffn": False}, {"attention": False, "ffn": False}], ids=str
)
def test_a_cell_is_blue_where_visual_rows_go_through_it(depth, rule):
    skipped = set(range(0, depth, 3))
    image = layer_chart(skipping(skipped, depth, **rule))
    for row, part in enumerate(("attention", "ffn")):
        wanted = [part not in rule or i not in skipped for i in range(depth)]
        assert blue_cells(image, depth, row, rows=2) == wanted


def test_bars_follow_the_scores_and_are_blue_where_a_layer_is_active():
    scores = torch.tensor([4.0, 1.0, 3.0, 2.0])
    image = layer_chart(skipping([1, 3], 4, scores, attention=False))
    pixels = np.asarray(image)[:84]
    starts, _ = columns(image, 4, rows=2)
    assert [tuple(pixels[-1, x].tolist()) for x in starts] == [BLUE, IDLE, BLUE, IDLE]
    heights = [int((pixels[:, x] != 255).any(-1).sum()) for x in starts]
    assert [h / 76 for h in heights] == (scores / 4).tolist()


def test_layers_that_an_order_does_not_name_have_the_highest_bars():
    scores = torch.tensor([0.0, float("inf"), 5.0])
    image = layer_chart(skipping([], 3, scores))
    starts, _ = columns(image, 3, rows=2)
    heights = (np.asarray(image)[:84] == BLUE).all(-1).sum(0)[starts]
    assert heights.tolist() == [2, 76, 76]


@pytest.mark.parametrize("scores", [[100.0, 1e-3, 1.0, 10.0], [100.0, 0.0, 1e-3, 1.0]], ids=str)
def test_scores_far_apart_are_still_told_apart(scores):
    image = layer_chart(skipping([], 4, torch.tensor(scores)))
    starts, _ = columns(image, 4, rows=2)
    heights = (np.asarray(image)[:84] == BLUE).all(-1).sum(0)[starts].tolist()
    assert np.argsort(heights).tolist() == np.argsort(scores).tolist()
    assert len(set(heights)) == 4 and heights[0] == 76
    assert all(h > 2 for h, s in zip(heights, scores, strict=True) if s > 0)


def test_what_every_layer_does_as_in_stock_has_no_row():
    plain, heads = LayerRule(), torch.tensor([True, True, False, False])
    height = layer_chart(LayerPlan((plain,) * 4)).height
    mask = torch.zeros(2, 9, dtype=torch.bool)
    for rule in (
        LayerRule(heads=heads),
        LayerRule(radius=2),
        LayerRule(unread=mask),
        LayerRule(sinks=mask),
    ):
        assert layer_chart(LayerPlan((plain, rule, plain, plain))).height == height + 29
    both = LayerRule(heads=heads, radius=2)
    assert layer_chart(LayerPlan((both,) * 4)).height == height + 2 * 29


def test_layers_without_visual_tokens_are_not_blue():
    plan = LayerPlan((LayerRule(radius=1), LayerRule(), LayerRule()))
    there, gone = layer_chart(plan, [1.0] * 3), layer_chart(plan, [1.0, 1.0, 0.0])
    assert gone.height == there.height + 29
    assert blue_cells(there, 3, 0, rows=3) == [True] * 3
    assert blue_cells(gone, 3, 0, rows=4) == blue_cells(gone, 3, 1, rows=4) == [True, True, False]


def test_tokens_of_another_depth_are_refused():
    with pytest.raises(InputError, match="tokens of 2 layers and a plan over 3, expected one"):
        layer_chart(LayerPlan.stock(3), [1.0, 1.0])
