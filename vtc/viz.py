"""Pictures of a decision: which tokens were kept, which were merged, and the scores behind it.

What is drawn on a picture comes from a `Selection`; `layer_chart` draws a `LayerPlan`. Cell (i, j)
of a grid [h, w] covers rows [i·H/h, (i+1)·H/h) and columns [j·W/w, (j+1)·W/w) of a picture [H, W]:
pass it as the model saw it (`as_seen`).
"""

from __future__ import annotations

import colorsys
import math
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

from vtc.errors import InputError
from vtc.layer_chart import layer_chart as layer_chart
from vtc.types import Selection

Box = Sequence[float]
Floats = NDArray[np.float32]

# pictures below this size are enlarged by a whole factor, so that a token is big enough to see
_SIDE = 560
# a dropped token is gray and this bright: dark enough to stand back, light enough to recognize
_DIM = 0.5
_TINT = 0.45
_HEAT = 0.72
# viridis (CC0) at 17 even steps; linear in between stays perceptually uniform
_VIRIDIS = (
    "440154 481567 482677 453781 404788 39568c 33638d 2d708e 287d8e "
    "238a8d 1f968b 20a387 29af7f 3cbb75 55c667 95d840 fde725"
)


def overlay(
    image: Image.Image,
    selection: Selection,
    group: int = 0,
    evidence: Iterable[Box] | None = None,
    frame: int = 0,
    part: int = -1,
) -> Image.Image:
    """The picture with kept tokens in full color and dropped ones gray and dark.

    Members of merged tokens are tinted, one color per slot they were merged into.

    Args:
        image: the picture of the group, as the model saw it.
        selection: one of `handle.selections`.
        group: which of its groups.
        evidence: boxes (x0, y0, x1, y1) in pixels of `image`, outlined.
        frame: which frame of a video group.
        part: which part of an image of several: by default the last, which shows all of the picture
            (the canvas of crops, or the thumbnail behind the tiles).

    Raises:
        InputError: no such group, part or frame, or its tokens are not a full grid.
    """
    tokens, grid = _tokens(selection, group, frame, part)
    big, factor = _enlarged(image)
    cells = _cells(big.size, grid)
    kept = selection.mask()[group].cpu().numpy()[tokens][cells][..., None]
    slots = _slots(selection, group)[tokens]
    merged = (slots >= 0)[cells][..., None]
    pixels = np.asarray(big, dtype=np.float32)
    gray = _gray(pixels)
    tinted = (1 - _TINT) * gray + _TINT * _colors(slots)[cells]
    pixels = np.where(kept, pixels, np.where(merged, tinted, _DIM * gray))
    return _with_boxes(_picture(_with_lines(pixels, cells)), evidence or (), factor)


def score_map(
    image: Image.Image, selection: Selection, group: int = 0, frame: int = 0, part: int = -1
) -> Image.Image:
    """The scores as a heat map over the gray picture: dark blue is the lowest, yellow the highest.

    Colors follow the scores on a log scale if they are all positive (attention is: a few tokens
    hold most of it), else on a linear one.

    Raises:
        InputError: the method has no scores, no such group or frame, or no full grid.
    """
    if selection.scores is None:
        raise InputError(
            "the selection holds no scores, expected one per token: its method does not score "
            "tokens; draw overlay() instead"
        )
    tokens, grid = _tokens(selection, group, frame, part)
    big, _ = _enlarged(image)
    heat = _heat(selection.scores[group].float().cpu().numpy()[tokens])
    gray = _gray(np.asarray(big, dtype=np.float32))
    color = _viridis(heat)[_cells(big.size, grid)]
    # the picture shades the colors, so that shapes stay visible under them
    shade = 0.55 + 0.45 * gray / 255
    return _picture(((1 - _HEAT) * gray + _HEAT * color) * shade)


def sink_map(
    image: Image.Image,
    selection: Selection,
    counts: Sequence[int],
    group: int = 0,
    frame: int = 0,
    part: int = -1,
) -> Image.Image:
    """The gray picture with the tokens that are sinks in color: yellow in most layers, dark in one.

    Args:
        image: the picture of the group, as the model saw it.
        selection: whose tokens they are.
        counts: for each of the group's tokens, in how many decoder layers it is one.
        group: which of its groups.
        frame: which frame of a video group.
        part: which part of an image of several, as in `overlay`.

    Raises:
        InputError: no such group, part or frame, not one count per token, or no full grid.
    """
    tokens, grid = _tokens(selection, group, frame, part)
    if len(counts) != selection.lengths[group]:
        raise InputError(
            f"got counts of {len(counts)} tokens for group {group}, expected "
            f"{selection.lengths[group]}: one for each of its tokens"
        )
    shown = np.asarray(counts, dtype=np.float32)[tokens]
    big, _ = _enlarged(image)
    cells = _cells(big.size, grid)
    gray = _gray(np.asarray(big, dtype=np.float32))
    color = _viridis(shown / np.float32(max(1, max(counts))))[cells]
    pixels = np.where((shown > 0)[cells][..., None], (1 - _HEAT) * gray + _HEAT * color, gray)
    return _picture(_with_lines(pixels.astype(np.float32), cells))


def as_seen(image: Image.Image, processor: Any) -> Image.Image:
    """The picture that reaches the encoder: resized and cropped by the processor, not normalized.

    Processors that cut it into tiles, crops or packed patches show all of it: it stays as it is.

    Args:
        image: any picture.
        processor: the model's processor, or its image processor.
    """
    prepare = getattr(processor, "image_processor", processor)
    out = prepare(
        images=image.convert("RGB"), do_rescale=False, do_normalize=False, return_tensors="np"
    )
    pixels = np.asarray(out["pixel_values"])
    if pixels.ndim != 4 or pixels.shape[:2] != (1, 3):
        return image.convert("RGB")
    return _picture(pixels[0].transpose(1, 2, 0).astype(np.float32))


def side_by_side(images: Sequence[Image.Image], titles: Sequence[str]) -> Image.Image:
    """One row of pictures on white, each under its title, scaled to one height.

    Raises:
        InputError: no picture, or not as many titles as pictures.
    """
    _check_titles(images, titles)
    gap, height = 16, max(image.height for image in images)
    size = max(14, height // 24)
    font, bar = ImageFont.load_default(size), 2 * size
    scaled = [i.resize((round(i.width * height / i.height), height)) for i in images]
    width = sum(i.width for i in scaled) + gap * (len(scaled) + 1)
    sheet = Image.new("RGB", (width, height + bar + gap), "white")
    draw, x = ImageDraw.Draw(sheet), gap
    for picture, title in zip(scaled, titles, strict=True):
        middle = (x + picture.width / 2, bar / 2)
        draw.text(middle, title, fill="black", font=font, anchor="mm")
        sheet.paste(picture.convert("RGB"), (x, bar))
        x += picture.width + gap
    return sheet


def one_below_other(images: Sequence[Image.Image], titles: Sequence[str]) -> Image.Image:
    """One column of pictures on white, each under its title, in their own sizes.

    Raises:
        InputError: no picture, or not as many titles as pictures.
    """
    _check_titles(images, titles)
    gap, size = 16, 18
    font = ImageFont.load_default(size)
    width = max(image.width for image in images) + 2 * gap
    sheet = Image.new("RGB", (width, gap + sum(i.height + 2 * size + gap for i in images)), "white")
    draw, y = ImageDraw.Draw(sheet), gap // 2
    for picture, title in zip(images, titles, strict=True):
        draw.text((width / 2, y + size), title, fill="black", font=font, anchor="mm")
        y += 2 * size
        sheet.paste(picture.convert("RGB"), ((width - picture.width) // 2, y))
        y += picture.height + gap
    return sheet


def _check_titles(images: Sequence[Image.Image], titles: Sequence[str]) -> None:
    if not images or len(images) != len(titles):
        raise InputError(
            f"got {len(images)} pictures and {len(titles)} titles, expected as many titles as "
            f"pictures and at least one"
        )


def last_left(selections: Sequence[Selection]) -> Selection:
    """Of the decisions of one call, the last that left any token: what the answer is made of.

    Raises:
        InputError: there is none.
    """
    left = [s for s in selections if int(s.slots.sum())]
    if not left:
        raise InputError(
            f"got {len(selections)} selections and none that kept a token, expected one: run the "
            "patched model on a picture"
        )
    return left[-1]


def _tokens(
    selection: Selection, group: int, frame: int, part: int
) -> tuple[slice, tuple[int, int]]:
    """Which tokens of a group belong to a frame of a part, and their grid (h, w)."""
    groups = len(selection.lengths)
    if not 0 <= group < groups:
        raise InputError(f"group={group} does not exist, expected 0..{groups - 1}")
    grids = (selection.grid[group],) if selection.parts is None else selection.parts[group]
    sizes, n = [t * h * w for t, h, w in grids], selection.lengths[group]
    if n != sum(sizes):
        raise InputError(
            f"group {group} has {n} tokens on {_grids(grids)}, expected {sum(sizes)}: only a "
            f"full grid can be drawn"
        )
    if not -len(grids) <= part < len(grids):
        raise InputError(f"part={part} does not exist, expected 0..{len(grids) - 1}")
    start, (t, h, w) = sum(sizes[: part % len(grids)]), grids[part]
    if not 0 <= frame < t:
        raise InputError(f"frame={frame} does not exist, expected 0..{t - 1}")
    return slice(start + frame * h * w, start + (frame + 1) * h * w), (h, w)


def _grids(grids: Sequence[tuple[int, int, int]]) -> str:
    return f"a grid {grids[0]}" if len(grids) == 1 else f"grids {tuple(grids)}"


def _slots(selection: Selection, group: int) -> NDArray[Any]:
    """The slot that each token was merged into with the largest weight, -1 for none: `int64[N]`."""
    slots = np.full(max(selection.lengths), -1)
    if selection.merge is not None:
        slot, token, weight = (part[group].cpu().numpy() for part in selection.merge)
        order = np.argsort(weight, kind="stable")
        order = order[weight[order] != 0]
        slots[token[order]] = slot[order]
    return slots


def _colors(slots: NDArray[Any]) -> Floats:
    """A color per token for the slot it belongs to: `[N, 3]`."""
    # steps of the golden ratio around the color wheel: slots that follow one another differ most
    golden = (math.sqrt(5) - 1) / 2
    colors = [colorsys.hsv_to_rgb(s * golden % 1, 0.85, 1) for s in slots.tolist()]
    return 255 * np.array(colors, dtype=np.float32)


def _heat(scores: NDArray[Any]) -> Floats:
    """Scores as numbers in [0, 1]."""
    finite = np.isfinite(scores)
    if not finite.any():
        return np.zeros(scores.shape, np.float32)
    if (scores[finite] > 0).all():
        scores = np.where(finite, np.log(np.where(finite, scores, 1)), scores)
    low, high = scores[finite].min(), scores[finite].max()
    clipped = np.clip(scores, low, high)
    heat: Floats = ((clipped - low) / (high - low or 1)).astype(np.float32)
    return heat


def _viridis(heat: Floats) -> Floats:
    """Colors `[..., 3]` of numbers in [0, 1]."""
    table = np.array([list(bytes.fromhex(c)) for c in _VIRIDIS.split()], dtype=np.float32)
    steps = np.linspace(0, 1, len(table))
    channels = [np.interp(heat, steps, table[:, c]) for c in range(3)]
    return np.stack(channels, -1).astype(np.float32)


def _enlarged(image: Image.Image) -> tuple[Image.Image, int]:
    if not isinstance(image, Image.Image):
        raise InputError(
            f"image is a {type(image).__name__}, expected a PIL image: pass "
            "PIL.Image.open(path), or PIL.Image.fromarray(array)"
        )
    factor = max(1, _SIDE // max(image.size))
    size = image.width * factor, image.height * factor
    return image.convert("RGB").resize(size, Image.Resampling.NEAREST), factor


def _cells(size: tuple[int, int], grid: tuple[int, int]) -> NDArray[Any]:
    """The token under each pixel: `int64[H, W]`."""
    (width, height), (h, w) = size, grid
    rows, columns = np.arange(height) * h // height, np.arange(width) * w // width
    cells: NDArray[Any] = rows[:, None] * w + columns
    return cells


def _gray(pixels: Floats) -> Floats:
    luma: Floats = pixels @ np.array([0.299, 0.587, 0.114], dtype=np.float32)
    return luma[..., None]


def _with_lines(pixels: Floats, cells: NDArray[Any]) -> Floats:
    """A thin grid: the first pixel row and column of every cell but the outermost, half white."""
    line = np.zeros(cells.shape, bool)
    line[1:] |= cells[1:] != cells[:-1]
    line[:, 1:] |= cells[:, 1:] != cells[:, :-1]
    return np.where(line[..., None], 0.75 * pixels + 0.25 * 255, pixels).astype(np.float32)


def _with_boxes(picture: Image.Image, boxes: Iterable[Box], factor: int) -> Image.Image:
    draw = ImageDraw.Draw(picture)
    for x0, y0, x1, y1 in boxes:
        corners = [x0 * factor, y0 * factor, x1 * factor - 1, y1 * factor - 1]
        draw.rectangle(corners, outline="black", width=5)
        inner = [corners[0] + 1, corners[1] + 1, corners[2] - 1, corners[3] - 1]
        draw.rectangle(inner, outline="white", width=3)
    return picture


def _picture(pixels: Floats) -> Image.Image:
    return Image.fromarray(np.clip(np.rint(pixels), 0, 255).astype(np.uint8))
