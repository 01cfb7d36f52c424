"""PixelPrune against a loop over cells, and an encoder that never sees what it drops."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import vtc
from tests.kit.models import MERGE, PATCH, build_model
from tests.kit.plain import cut_up
from tests.kit.prompts import build_inputs
from tests.methods.test_tome import attended
from vtc.errors import OptionError
from vtc.selectors.predicted import unpredicted


def looped(grid: list[list[list[float]]], tau: float) -> set[tuple[int, int]]:
    """Cells that are kept, one after the other."""

    def equal(a: list[float], b: list[float]) -> bool:
        return max(abs(x - y) for x, y in zip(a, b, strict=True)) <= tau

    known: dict[tuple[int, int], list[float]] = {}
    kept = set()
    for y, row in enumerate(grid):
        for x, cell in enumerate(row):
            left, above, corner = (known.get(at) for at in ((y, x - 1), (y - 1, x), (y - 1, x - 1)))
            guess = left if above is None else above
            if left is not None and above is not None and corner is not None:
                turns = equal(corner, left) and not equal(corner, above)
                guess = above if turns else left
            if guess is None or not equal(guess, cell):
                kept.add((y, x))
                guess = cell
            known[y, x] = guess
    return kept


@given(
    st.integers(1, 5), st.integers(1, 5), st.integers(0, 99), st.sampled_from([0.0, 1.0]), st.data()
)
def test_cells_equal_the_loop(h: int, w: int, seed: int, tau: float, data: st.DataObject) -> None:
    draw = torch.Generator().manual_seed(seed)
    pixels = torch.randint(0, data.draw(st.integers(1, 5)), (2, h, w, 2), generator=draw).float()
    got = unpredicted(pixels, tau)
    for frame in range(2):
        want = looped(pixels[frame].tolist(), tau)
        assert {tuple(at) for at in got[frame].nonzero().tolist()} == want
        assert (0, 0) in want


def flat(shape: tuple[int, ...], seed: int) -> Tensor:
    """A picture of large areas of one color, patch by patch."""
    draw = torch.Generator().manual_seed(seed)
    h, w = shape[-2] // PATCH, shape[-1] // PATCH
    small = torch.randint(0, 2, (*shape[:-2], h // 2 + 1, w // 2 + 1), generator=draw).float()
    wide = small.repeat_interleave(2 * PATCH, -1).repeat_interleave(2 * PATCH, -2)
    return wide[..., : shape[-2], : shape[-1]]


def test_the_encoder_sees_what_is_kept_alone() -> None:
    model = build_model("llava")
    inputs = build_inputs("llava", [[3, "image", 4], [2, "image", 5]])
    inputs["pixel_values"] = flat(tuple(inputs["pixel_values"].shape), 3)
    seen: list[dict[str, Any]] = []
    hook = model.model.language_model.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(kwargs), with_kwargs=True
    )
    with torch.no_grad(), vtc.patch(model, "pixelprune") as handle:
        model(**inputs)
        hook.remove()
        selection = handle.token_selections[0]
    embeds, mask = seen[0]["inputs_embeds"], seen[0]["attention_mask"].bool()
    tower, side = model.model.vision_tower, inputs["pixel_values"].shape[-1] // PATCH
    for row, pixels in enumerate(inputs["pixel_values"]):
        grid = [
            [
                pixels[:, y * PATCH : (y + 1) * PATCH, x * PATCH : (x + 1) * PATCH].flatten()
                for x in range(side)
            ]
            for y in range(side)
        ]
        want = sorted(y * side + x for y, x in looped([[c.tolist() for c in r] for r in grid], 0.0))
        kept = selection.keep[row, selection.valid[row]].tolist()
        assert kept == want and 1 < len(kept) < side * side
        with torch.no_grad():
            x = tower.pre_layrnorm(tower.embeddings(pixels[None]))[0]
            x = x[[0, *(1 + i for i in kept)]]
            for layer in tower.encoder.layers[:5]:
                x, _ = attended(layer, x, None)
            tokens = model.model.multi_modal_projector(x[None, 1:])[0]
        first = (3, 2)[row]
        got = embeds[row][mask[row]][first : first + len(kept)]
        torch.testing.assert_close(got, tokens, atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("family", ["qwen2_vl", "qwen2_5_vl", "qwen3_vl"])
def test_cells_of_packed_patches_are_those_of_the_picture(family: str) -> None:
    model = build_model(family)
    inputs = build_inputs(family, [[3, ("image", 48, 32), 4], [2, "image", 5]])
    pictures, patches = [], []
    for i, (t, h, w) in enumerate(inputs["image_grid_thw"].tolist()):
        frames = flat((1, 3, h * PATCH, w * PATCH), i).repeat(2, 1, 1, 1)
        pictures.append(frames[0])
        patches.append(cut_up(frames, (t, h, w)))
    inputs["pixel_values"] = torch.cat(patches)
    with torch.no_grad(), vtc.patch(model, "pixelprune") as handle:
        model(**inputs)
    selection, size = handle.token_selections[0], PATCH * MERGE
    for g, picture in enumerate(pictures):
        h, w = picture.shape[1] // size, picture.shape[2] // size
        cells = picture.unfold(1, size, size).unfold(2, size, size)  # [3, h, w, size, size]
        grid = [[cells[:, y, x].flatten().tolist() for x in range(w)] for y in range(h)]
        want = sorted(y * w + x for y, x in looped(grid, 0.0))
        assert selection.keep[g, selection.valid[g]].tolist() == want


@pytest.mark.parametrize("family", ["llava", "qwen2_5_vl", "internvl"])
def test_a_picture_without_equals_is_left_alone(family: str) -> None:
    model, inputs = build_model(family), build_inputs(family, [[3, "image", 4]])
    with torch.no_grad():
        want = model(**inputs).logits
        with vtc.patch(model, "pixelprune"):
            got = model(**inputs).logits
    # InternVL's patches stand in another order, and sums round differently
    torch.testing.assert_close(got, want, atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("family", ["llava_next", "internvl", "llava_siglip"])
def test_a_picture_of_one_color_is_one_patch_a_row(family: str) -> None:
    model, inputs = build_model(family), build_inputs(family, [[3, "image", 4]])
    inputs["pixel_values"] = torch.ones_like(inputs["pixel_values"])
    with torch.no_grad(), vtc.patch(model, "pixelprune") as handle:
        model(**inputs)
    rows = inputs["pixel_values"].flatten(0, -4).shape[0]
    assert 1 <= handle.report().kept_tokens[0] <= rows


def test_a_negative_difference_is_refused() -> None:
    with pytest.raises(OptionError, match=r"tau=-1\.0"):
        vtc.method("pixelprune", tau=-1)
