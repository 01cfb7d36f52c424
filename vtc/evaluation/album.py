"""The pictures of a page as data URIs, as large and as good as all of them together may be."""

from __future__ import annotations

import base64
import io
from collections.abc import Iterable

from PIL import Image

# bytes of all pictures: what a page of 5 MB has room for beside figures and tables
BUDGET = 2_400_000
# width of a picture, of a chart with letters, and WebP's quality: the first that fits is taken
_SIZES = ((288, 760, 76), (256, 680, 68), (224, 600, 60), (192, 520, 50), (160, 440, 40))


class Album:
    """Pictures by identity, each encoded once.

    Args:
        pictures: shown a few hundred pixels wide.
        charts: with letters, shown wide.
        budget: bytes of all together; where even the smallest size needs more, it is taken.
    """

    def __init__(
        self,
        pictures: Iterable[Image.Image],
        charts: Iterable[Image.Image] = (),
        budget: int = BUDGET,
    ) -> None:
        small, wide = list(pictures), list(charts)
        # an identity is one only as long as its object lives
        self._alive = [*small, *wide]
        for width, chart, quality in _SIZES:
            sized = [(image, width) for image in small] + [(image, chart) for image in wide]
            self._uris = {id(image): _uri(image, most, quality) for image, most in sized}
            if sum(map(len, self._uris.values())) <= budget:
                break

    def uri(self, image: Image.Image) -> str:
        """The data URI of one of the pictures."""
        return self._uris[id(image)]


def _uri(image: Image.Image, width: int, quality: int) -> str:
    """A WebP of at most this width."""
    shown = image.convert("RGB")
    if shown.width > width:
        height = max(1, round(width * shown.height / shown.width))
        shown = shown.resize((width, height), Image.Resampling.LANCZOS)
    buffer = io.BytesIO()
    shown.save(buffer, "WEBP", quality=quality, method=5)
    return "data:image/webp;base64," + base64.b64encode(buffer.getvalue()).decode()
