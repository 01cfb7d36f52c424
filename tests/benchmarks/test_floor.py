"""The arithmetic of floors against torch's own counter, on toy models."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from vtc.bench import floor
from vtc.bench.ceilings import Ceilings, Work, measured
from vtc.bench.families import SHAPES, tiny
from vtc.bench.shapes import Shape, build

TOYS = {name: tiny(shape) for name, shape in SHAPES.items()}


def embedding(shape: Any, images: int) -> int:
    """FLOPs of the convolution that makes patches, which the floor leaves out."""
    rows, long = shape.patches
    frames, cls = (2, 0) if shape.name.startswith("qwen") else (1, 1)
    values = 3 * frames * shape.patch**2
    return int(2 * images * rows * (long - cls) * values * shape.tower.width)


@pytest.mark.parametrize("name", TOYS)
@pytest.mark.parametrize("batch", [1, 2])
def test_flops_are_those_of_torch(load: Callable[[str], Any], name: str, batch: int) -> None:
    shape = TOYS[name]
    model = build(shape, "cpu", torch.float32)
    inputs = shape.inputs(batch, next(model.parameters()))
    mapping = load("prefill.work")._CPU
    with FlopCounterMode(display=False, custom_mapping=mapping) as counter, torch.no_grad():
        model(**inputs, logits_to_keep=1)
    d, s = shape.decoder, shape.entries()
    # the counter takes attention as whole, the floor as causal
    other_half = 2 * batch * d.layers * s * s * d.width
    work = floor.encoder(shape, batch) + floor.prefill(shape, batch, s)
    # rotary angles are a product of little
    assert work.flops + other_half + embedding(shape, batch) == pytest.approx(
        counter.get_total_flops(), rel=0.01
    )


@pytest.mark.parametrize("name", SHAPES)
def test_weights_are_those_of_the_model(name: str) -> None:
    shape = SHAPES[name]
    model = build(shape, "meta", torch.bfloat16)
    weights = sum(p.numel() for p in model.parameters() if p.dim() > 1)
    d = shape.decoder
    embeddings = d.vocabulary * d.width
    counted = (floor.encoder(shape, 1).bytes + floor.decode(shape, 1, 0).bytes) / 2
    # patch and position embeddings are not read as matrices
    assert counted + embeddings == pytest.approx(weights, rel=0.002)


@pytest.mark.parametrize("name", SHAPES)
def test_fewer_patches_and_tokens_are_less_work(name: str) -> None:
    shape: Shape = SHAPES[name]
    rows, long = shape.patches
    half = [rows * long / 2.0] * shape.tower.blocks
    whole = floor.encoder(shape, 1)
    less = floor.encoder(shape, 1, half)
    assert 0.3 < less.flops / whole.flops < 0.7 and less.bytes == whole.bytes
    assert floor.prefill(shape, 1, 100).flops < floor.prefill(shape, 1, 200).flops
    blocks = floor.blocks(shape, 1)
    assert len(blocks) == shape.tower.blocks
    if shape.name.startswith("qwen"):
        assert blocks[7].flops > blocks[8].flops


def test_the_floor_is_that_of_what_is_scarcer() -> None:
    ceilings = Ceilings(copy=1e12, matmul=1e14)
    assert ceilings.floor_ms(Work(bytes=1e9, flops=1e9)) == pytest.approx(1.0)
    assert ceilings.floor_ms(Work(bytes=1e3, flops=1e12)) == pytest.approx(10.0)
    assert ceilings.floor_ms(Work(2, 6) * 2 + Work(1e9)) == pytest.approx(1.0, rel=1e-6)


def test_ceilings_are_measured() -> None:
    found = measured(torch.device("cpu"), tiny=True)
    assert found.copy > 0 and found.matmul > 0
    assert found.to_dict() == {"ceiling_copy": found.copy, "ceiling_matmul": found.matmul}


def test_prompts_have_the_entries_that_the_shape_says() -> None:
    for shape in TOYS.values():
        for batch, images in ((1, 1), (2, 1), (1, 3)):
            ids = shape.inputs(batch, torch.empty(0), images)["input_ids"]
            assert ids.shape == (batch, shape.entries(images))
            placeholders = (ids == shape.image_token).sum(1)
            assert set(placeholders.tolist()) == {images * (shape.visual + shape.newlines)}
    assert replace(SHAPES["llava-1.5-7b"], crops=5).visual == SHAPES["llava-next-7b"].visual == 2880
    assert SHAPES["qwen2.5-vl-7b"].visual == 1296 and SHAPES["internvl3-8b"].visual == 13 * 256
