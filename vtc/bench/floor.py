"""The least work of each part of a call, by arithmetic: FLOPs, and bytes that must be moved.

bfloat16; of bytes the weights, read once, and keys and values. The language model's attention is
counted as causal, the tower's as whole.
"""

from __future__ import annotations

from collections.abc import Sequence

from vtc.bench.ceilings import Work
from vtc.bench.shapes import Shape

_BYTES = 2


def block(shape: Shape, index: int, patches: float, rows: int) -> Work:
    """One block of the tower.

    Args:
        shape: the model.
        index: which block.
        patches: that go through it, over all rows.
        rows: crops, tiles or images; patches attend within a row, or within a window of it.
    """
    tower = shape.tower
    weights = 4 * tower.width**2 + tower.matrices * tower.width * tower.ffn
    seen = min(shape.windows[index], patches / rows)
    return Work(_BYTES * weights, patches * (2 * weights + 4 * seen * tower.width))


def blocks(
    shape: Shape, images: int, patches: Sequence[float] | None = None, rows: int | None = None
) -> list[Work]:
    """Of each block, for so many images.

    Args:
        shape: the model.
        images: over all prompts.
        patches: through each block, over all rows; None: all of them.
        rows: None: as many as the images have.
    """
    per_image, long = shape.patches
    rows = rows or images * per_image
    given = patches or [float(images * per_image * long)] * shape.tower.blocks
    return [block(shape, i, n, rows) for i, n in enumerate(given)]


def encoder(
    shape: Shape,
    images: int,
    patches: Sequence[float] | None = None,
    tokens: float | None = None,
) -> Work:
    """Tower and connector; `tokens` of each image instead of all."""
    tokens = shape.visual if tokens is None else tokens
    total = Work(_BYTES * shape.connector, 2 * images * tokens * shape.connector)
    for one in blocks(shape, images, patches):
        total = total + one
    return total


def layer_weights(shape: Shape) -> int:
    """Of one decoder layer."""
    d = shape.decoder
    keys = 2 * d.width * (d.width // d.heads) * d.kv_heads
    return 2 * d.width**2 + keys + 3 * d.width * d.ffn


def kv_bytes(shape: Shape, entries: float) -> float:
    """Keys and values of so many entries, all layers."""
    d = shape.decoder
    return 2 * _BYTES * d.layers * (d.width // d.heads) * d.kv_heads * entries


def gather(shape: Shape, batch: int, entries: float) -> Work:
    """Embeddings of the entries that stay: read and written."""
    return Work(2 * _BYTES * batch * entries * shape.decoder.width)


def prefill(shape: Shape, batch: int, entries: float) -> Work:
    """B prompts of S entries each, up to the logits of the last."""
    d = shape.decoder
    weights = d.layers * layer_weights(shape)
    head = d.width * d.vocabulary
    return Work(
        _BYTES * (weights + head) + kv_bytes(shape, batch * entries),
        2 * batch * (entries * weights + head) + 2 * batch * d.layers * entries**2 * d.width,
    )


def decode(shape: Shape, batch: int, entries: float) -> Work:
    """One step of B rows behind S entries each."""
    d = shape.decoder
    weights = d.layers * layer_weights(shape) + d.width * d.vocabulary
    return Work(
        _BYTES * weights + kv_bytes(shape, batch * entries),
        2 * batch * weights + 4 * batch * d.layers * entries * d.width,
    )
