"""What recipes keep of 576 and 2880 tokens, counted in runs on models as deep as the rows' own,
equals what the published conventions say, written out here once more."""

from __future__ import annotations

import dataclasses
from functools import cache
from typing import Any

import pytest
import torch

import vtc
from tests.kit.models import IMAGE, build_model, text_config, tower_config
from vtc.recipes import Recipe, names, recipe

pytestmark = pytest.mark.filterwarnings("ignore:.*(do_sample|max_length).*")

LAYERS, BLOCKS, SIDE, CROP_TOKENS = 32, 24, 96, 576
# of official code: what stays behind layers 2, 6 and 15 as it is
SPARSEVLM = {192: (300, 200, 110), 128: (303, 110, 36), 64: (66, 30, 17)}


@cache
def deep(family: str) -> Any:
    """A tiny model with the row's numbers of layers, blocks and tokens."""
    from transformers import CLIPVisionConfig, LlamaConfig

    given = {
        "vision_config": CLIPVisionConfig(**tower_config("llava", BLOCKS, image_size=SIDE)),
        "text_config": LlamaConfig(**text_config(LAYERS) | {"max_position_embeddings": 4096}),
    }
    if family == "llava_next":
        given["image_grid_pinpoints"] = [[2 * SIDE, 2 * SIDE]]
    return build_model(family, blocks=BLOCKS, layers=LAYERS, **given)


def inputs_of(family: str) -> dict[str, torch.Tensor]:
    """A prompt with one picture; of LLaVA-NeXT a square one, of which no crop is padding."""
    generator = torch.Generator().manual_seed(1)
    several = family == "llava_next"
    # a newline token behind each row of the two crops' height
    count = 5 * CROP_TOKENS + 2 * 24 if several else CROP_TOKENS
    ids = [5, 6, 7, *[IMAGE] * count, 8, 9, 10, 11, 12, 13]
    shape = (1, 5, 3, SIDE, SIDE) if several else (1, 3, SIDE, SIDE)
    out = {
        "input_ids": torch.tensor([ids]),
        "attention_mask": torch.ones(1, len(ids), dtype=torch.int64),
        "pixel_values": torch.randn(shape, generator=generator),
    }
    return out | ({"image_sizes": torch.tensor([[2 * SIDE, 2 * SIDE]])} if several else {})


def published(found: Recipe) -> list[int]:
    """Visual tokens in each of 32 layers."""
    budget, n = int(found.budget), found.tokens or 0
    if found.method == "fastv":  # the average over layers is the budget
        return [n] * 2 + [round((LAYERS * budget - 2 * n) / (LAYERS - 2))] * (LAYERS - 2)
    if found.method == "dart":  # pivots, and as many for each of 8 pivots
        return [n] * 2 + [4 + 8 * (budget // 8)] * (LAYERS - 2)
    if found.method == "sparsevlm":
        counts, left = [n] * 3, n
        for kept, layers in zip(SPARSEVLM[budget], (4, 9, 16), strict=True):
            recycled = int(0.3 * (left - kept)) + 1
            left = kept + int(recycled / 10) + 1
            counts += [left] * layers
        return counts
    if found.method == "flowcut" and n > CROP_TOKENS:  # half of T per crop, then T
        return [5 * (budget // 2)] * 2 + [budget] * (LAYERS - 2)
    return [budget] * LAYERS


def kept(found: Recipe, family: str) -> tuple[Any, list[int]]:
    """The report of a run, and the visual tokens in each layer."""
    method = found.build()
    if "clip" in found.options:  # no CLIP here; it decides which, not how many
        method = dataclasses.replace(method, clip=None)
    model = deep(family)
    with vtc.patch(model, method, found.keep, positions=found.positions) as handle:
        model.generate(**inputs_of(family), max_new_tokens=1, do_sample=False)
        report = handle.report()
    return report, list(report.layer_tokens) or [report.llm_tokens[0]] * LAYERS


def check(name: str, family: str) -> None:
    found = recipe(name)
    report, layers = kept(found, family)
    assert report.visual_tokens == (found.tokens,)
    wanted = published(found)
    if found.method == "holov":  # tokens of zeros are left out
        assert 0.8 * wanted[0] <= layers[0] <= wanted[0] and len({*layers}) == 1
    elif found.method == "todre":  # none in late layers where text looks away
        assert layers[:28] == wanted[:28] and {*layers[28:]} <= {0, wanted[-1]}
    else:
        assert layers == wanted
    if spans := found.spans():
        assert layers == [n for first, last, n in spans for _ in range(first, last + 1)]


def rows(slug: str) -> list[str]:
    return [
        name
        for name in names()
        if recipe(name).model.slug == slug and not recipe(name).setting.refused
    ]


@pytest.mark.parametrize("name", rows("llava1.5"))
def test_of_576_tokens(name: str) -> None:
    check(name, "llava")


@pytest.mark.slow
@pytest.mark.parametrize("name", rows("llavanext"))
def test_of_2880_tokens(name: str) -> None:
    check(name, "llava_next")
