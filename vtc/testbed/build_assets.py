"""Builds the picture data of the testbed: `python -m vtc.testbed.build_assets`.

Cuts 128x128 tiles out of photographs that scikit-image and scikit-learn ship, and stores
scikit-learn's handwritten digits and Pillow's printed ones. Sources and licenses are in
assets/LICENSES.md. Needs scikit-image and scikit-learn; nothing else in the testbed does.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageFont

FOLDER = Path(__file__).parent / "assets"
TILE = 128
SPLITS = ("train", "validation", "test")
# tiles per row of an atlas
COLUMNS = 8
# (file of skimage.data, longest side after resizing); every one is CC0 or public domain
SKIMAGE_PHOTOS = (
    ("chelsea.png", 512),
    ("coffee.png", 640),
    ("camera.png", 512),
    ("rocket.jpg", 640),
    ("brick.png", 384),
    ("grass.png", 384),
    ("gravel.png", 384),
    ("hubble_deep_field.jpg", 512),
    ("retina.jpg", 768),
    ("clock_motion.png", 400),
)
# CC BY 2.0, credited in LICENSES.md
SKLEARN_PHOTOS = (("china.jpg", 640), ("flower.jpg", 640))


def photographs() -> list[Image.Image]:
    """All source photographs as RGB, resized to the longest side given above."""
    import skimage.data
    import sklearn.datasets

    skimage_folder = Path(skimage.data.__file__).parent
    sklearn_folder = Path(sklearn.datasets.__file__).parent / "images"
    files = [(skimage_folder / name, side) for name, side in SKIMAGE_PHOTOS]
    files += [(sklearn_folder / name, side) for name, side in SKLEARN_PHOTOS]
    photos = []
    for path, side in files:
        photo = Image.open(path).convert("RGB")
        scale = side / max(photo.size)
        size = (round(photo.width * scale), round(photo.height * scale))
        photos.append(photo.resize(size, Image.Resampling.LANCZOS))
    return photos


def tiles(photo: Image.Image) -> list[Image.Image]:
    """Cuts that share no pixel, the near-uniform ones left out."""
    cuts = []
    for top in range(0, photo.height - TILE + 1, TILE):
        for left in range(0, photo.width - TILE + 1, TILE):
            cut = photo.crop((left, top, left + TILE, top + TILE))
            if np.asarray(cut, dtype=np.float32).std(axis=(0, 1)).mean() > 6:
                cuts.append(cut)
    return cuts


def deal(count: int) -> list[str]:
    """The split of each of `count` cuts of one photograph: about 70 % train, 10 % validation."""
    return [
        "test" if i % 5 == 2 else "validation" if i % 10 == 6 else "train" for i in range(count)
    ]


def save_backgrounds(folder: Path) -> dict[str, int]:
    """Writes one JPEG atlas per split and returns how many tiles each holds."""
    dealt: dict[str, list[Image.Image]] = {split: [] for split in SPLITS}
    for photo in photographs():
        cuts = tiles(photo)
        for cut, split in zip(cuts, deal(len(cuts)), strict=True):
            dealt[split].append(cut)
    for split, cuts in dealt.items():
        # a full last row, so that the tile count follows from the size of the atlas
        cuts = cuts[: len(cuts) // COLUMNS * COLUMNS]
        dealt[split] = cuts
        atlas = Image.new("RGB", (COLUMNS * TILE, len(cuts) // COLUMNS * TILE))
        for i, cut in enumerate(cuts):
            atlas.paste(cut, (i % COLUMNS * TILE, i // COLUMNS * TILE))
        # no chroma subsampling: its upsampling is the part on which decoders differ
        atlas.save(folder / f"backgrounds_{split}.jpg", quality=72, subsampling=0, optimize=True)
    return {split: len(cuts) for split, cuts in dealt.items()}


def printed_digits(height: int = 14, width: int = 10, fine: int = 4) -> np.ndarray:
    """Ink of the digits 0-9 in Pillow's own font, uint8 [10, height, width]."""
    font = ImageFont.load_default(size=height * fine * 0.98)
    glyphs = []
    for digit in range(10):
        canvas = Image.new("L", (width * fine, height * fine), 0)
        draw = ImageDraw.Draw(canvas)
        middle = (width * fine / 2, height * fine / 2)
        draw.text(middle, str(digit), fill=255, font=font, anchor="mm", stroke_width=1)
        glyphs.append(np.asarray(canvas.resize((width, height), Image.Resampling.BOX)))
    return np.stack(glyphs)


def handwritten_digits() -> dict[str, np.ndarray]:
    """scikit-learn's 8x8 digits (values 0-16), images and labels per split."""
    from sklearn.datasets import load_digits

    bunch = load_digits()
    images, labels = bunch.images.astype(np.uint8), bunch.target.astype(np.uint8)
    arrays: dict[str, np.ndarray] = {}
    # dealt within each class, so that every split has every digit
    split_of = np.empty(len(labels), dtype=object)
    for digit in range(10):
        where = np.flatnonzero(labels == digit)
        split_of[where] = deal(len(where))
    for split in SPLITS:
        arrays[f"hand_{split}"] = images[split_of == split]
        arrays[f"hand_{split}_label"] = labels[split_of == split]
    return arrays


def main() -> None:
    """Writes every asset and prints what was stored."""
    FOLDER.mkdir(parents=True, exist_ok=True)
    counts = save_backgrounds(FOLDER)
    arrays: dict[str, Any] = {"printed": printed_digits(), **handwritten_digits()}
    np.savez_compressed(FOLDER / "digits.npz", **arrays)
    print("background tiles:", counts)
    print({name: array.shape for name, array in arrays.items()})


if __name__ == "__main__":
    main()
