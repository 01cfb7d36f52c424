"""Pictures of a page: all are there, and together they fit."""

import base64
import io

import numpy as np
import pytest
from PIL import Image

from vtc.evaluation.album import Album

pytestmark = pytest.mark.eval


def noise(seed, width=400, height=200):
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def opened(uri):
    head, _, data = uri.partition(",")
    assert head == "data:image/webp;base64"
    return Image.open(io.BytesIO(base64.b64decode(data)))


def test_a_picture_keeps_its_shape_and_a_small_one_its_size():
    wide, small = noise(0), noise(1, 40, 30)
    album = Album([wide, small])
    assert opened(album.uri(wide)).size == (288, 144)
    assert opened(album.uri(small)).size == (40, 30)


def test_charts_are_shown_wider_than_pictures():
    picture, chart = noise(0, 900, 300), noise(1, 900, 300)
    album = Album([picture], [chart])
    assert opened(album.uri(chart)).width > 2 * opened(album.uri(picture)).width


def test_more_pictures_than_there_is_room_for_are_smaller():
    pictures = [noise(i) for i in range(6)]
    free = sum(len(Album(pictures).uri(p)) for p in pictures)
    tight = Album(pictures, budget=free // 2)
    assert sum(len(tight.uri(p)) for p in pictures) <= free // 2
    assert all(opened(tight.uri(p)).width < 288 for p in pictures)


def test_no_picture_is_left_out_where_nothing_fits():
    picture = noise(0)
    assert opened(Album([picture], budget=1).uri(picture)).width == 160


def test_no_pictures_are_fine():
    assert Album([]) is not None
