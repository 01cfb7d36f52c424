"""FlowCut inside the encoder equals a plain statement of it: one image at a time, full attention
maps, patches taken out of a list."""

from __future__ import annotations

import math
from collections.abc import Callable, Generator, Iterator
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

import vtc
from tests.kit.models import CROP, FAMILIES, PATCH, PINPOINTS, PLACEHOLDERS, build_model
from tests.kit.oracle import kept_columns, visual_places
from tests.kit.prompts import build_inputs

# a block's queries, keys and values [heads, n, d], its scale, and what follows the attention
Parts = tuple[Tensor, Tensor, Tensor, float, Callable[[Tensor], Tensor]]


@dataclass
class Row:
    """One row of the encoder: patches in the order of its LLM tokens, and where it goes on."""

    hidden: Tensor  # [c + n, width]
    first: int  # 1 with a [CLS]
    blocks: list[Callable[[Tensor, Tensor], Parts]]  # (hidden, patches left) -> parts
    sees: list[Tensor | None]  # bool[n, n] over original patches, None: everything
    m: int


def heads(x: Tensor, count: int) -> Tensor:
    return x.unflatten(-1, (count, -1)).transpose(0, 1)


def clip_block(block: Any) -> Callable[[Tensor, Tensor], Parts]:
    def parts(x: Tensor, left: Tensor) -> Parts:
        attention, y = block.self_attn, block.layer_norm1(x)
        q, k, v = (
            heads(getattr(attention, f"{n}_proj")(y), attention.num_heads) for n in ("q", "k", "v")
        )

        def after(out: Tensor) -> Tensor:
            z = x + attention.out_proj(out.transpose(0, 1).flatten(1))
            return z + block.mlp(block.layer_norm2(z))

        return q, k, v, attention.scale, after

    return parts


def internvl_block(block: Any) -> Callable[[Tensor, Tensor], Parts]:
    def parts(x: Tensor, left: Tensor) -> Parts:
        attention, y = block.attention, block.layernorm_before(x)
        q = heads(attention.q_norm(attention.q_proj(y)), attention.num_heads)
        k = heads(attention.k_norm(attention.k_proj(y)), attention.num_heads)
        v = heads(attention.v_proj(y), attention.num_heads)

        def after(out: Tensor) -> Tensor:
            z = x + block.lambda_1 * attention.projection_layer(out.transpose(0, 1).flatten(1))
            return z + block.lambda_2 * block.mlp(block.layernorm_after(z))

        return q, k, v, attention.scale, after

    return parts


def qwen_block(block: Any, cos: Tensor, sin: Tensor) -> Callable[[Tensor, Tensor], Parts]:
    def turned(x: Tensor, left: Tensor) -> Tensor:
        half = torch.cat([-x[..., x.shape[-1] // 2 :], x[..., : x.shape[-1] // 2]], -1)
        return x * cos[left] + half * sin[left]

    def parts(x: Tensor, left: Tensor) -> Parts:
        attention = block.attn
        q, k, v = (
            attention.qkv(block.norm1(x)).unflatten(-1, (3, attention.num_heads, -1)).unbind(1)
        )
        q, k = turned(q.transpose(0, 1), left), turned(k.transpose(0, 1), left)

        def after(out: Tensor) -> Tensor:
            z = x + attention.proj(out.transpose(0, 1).flatten(1))
            return z + block.mlp(block.norm2(z))

        return q, k, v.transpose(0, 1), attention.scaling, after

    return parts


def llava_rows(model: Any, inputs: Any) -> Iterator[list[Row]]:
    """Crops of each image of a LLaVA."""
    tower = model.model.vision_tower
    tower = getattr(tower, "vision_model", tower)
    clip = model.config.vision_config.model_type == "clip_vision_model"
    pixels = inputs["pixel_values"]
    for i, image in enumerate(pixels):
        crops = image[None] if pixels.dim() == 4 else image
        if pixels.dim() == 5:
            crops = crops[crops.flatten(1).any(1)]  # crops that are not there hold zeros
            counts = inputs.get("batch_num_images")
            if counts is not None and [n for n in counts.tolist() for _ in range(n)][i] > 1:
                crops = crops[:1]
        x = tower.embeddings(crops)
        x = tower.pre_layrnorm(x) if clip else x
        blocks = [clip_block(b) for b in tower.encoder.layers]
        yield [Row(h, int(clip), blocks, [None] * len(blocks), 1) for h in x]


def internvl_rows(model: Any, inputs: Any, tiles: list[int]) -> Iterator[list[Row]]:
    tower = model.model.vision_tower
    side = inputs["pixel_values"].shape[-1] // tower.config.patch_size[0]
    # four patches of a token side by side, tokens row by row
    numbers = torch.arange(side * side).view(side // 2, 2, side // 2, 2)
    order = numbers.permute(0, 2, 1, 3).flatten()
    blocks = [internvl_block(b) for b in tower.encoder.layer]
    for part in inputs["pixel_values"].split(tiles):
        x = tower.embeddings(part)
        x = torch.cat([x[:, :1], x[:, 1:][:, order]], 1)
        yield [Row(h, 1, blocks, [None] * len(blocks), 4) for h in x]


def qwen_rows(model: Any, pixels: Tensor, grids: Tensor) -> Iterator[list[Row]]:
    """One row per image or video; frames, and windows, do not see each other."""
    visual = model.model.visual
    start: dict[str, Any] = {}

    def stop(module: Any, args: Any, kwargs: Any) -> None:
        start["x"], (start["cos"], start["sin"]) = args[0], kwargs["position_embeddings"]
        raise StopIteration

    window = getattr(visual, "window_size", None)
    for part, (t, h, w) in zip(pixels.split(grids.prod(-1).tolist()), grids.tolist(), strict=True):
        hook = visual.blocks[0].register_forward_pre_hook(stop, with_kwargs=True)
        try:
            visual(part, grid_thw=torch.tensor([[t, h, w]]))
        except (StopIteration, RuntimeError):
            pass
        finally:
            hook.remove()
        x, cos, sin = start["x"], start["cos"], start["sin"]
        frame = torch.arange(t).repeat_interleave(h * w)
        unit = torch.arange(t * h * w // 4)
        cell = unit % (h * w // 4)
        row, column = cell // (w // 2), cell % (w // 2)
        same = frame[:, None] == frame
        sees: list[Tensor | None] = [same] * len(visual.blocks)
        if window is not None:
            size = window // visual.patch_size // 2
            at = (unit // (h * w // 4) * 1000 + row // size) * 1000 + column // size
            order = at.sort(stable=True).indices  # the order in which stock puts tokens
            back = order.argsort()
            patches = (back[:, None] * 4 + torch.arange(4)).flatten()
            x, cos, sin = x[patches], cos[patches], sin[patches]
            near = at.repeat_interleave(4)
            windowed = near[:, None] == near
            sees = [
                same if b in visual.fullatt_block_indexes else windowed
                for b in range(len(visual.blocks))
            ]
        yield [Row(x, 0, [qwen_block(b, cos, sin) for b in visual.blocks], sees, 4)]


Left = tuple[list[int], list[int], Tensor]


def flowcut(rows: list[Row], tap: int, target: int) -> list[Left]:
    """Of each row of an image, which all drop as many, the units left, how many patches went
    through each block, and the features `[n, width]` behind the tap."""
    steps = [flow(row, tap, target) for row in rows]
    amounts = [next(step) for step in steps]
    while True:
        found = []
        for step, amount in zip(steps, [max(amounts)] * len(steps), strict=True):
            try:
                found.append(step.send(amount))
            except StopIteration as end:
                found.append(end.value)
        if not isinstance(found[0], int):
            return found
        amounts = found


def flow(row: Row, tap: int, target: int) -> Generator[int, int, Left]:
    """One row: says how many units it would drop behind a block, is told how many it does."""
    x, first, m = row.hidden, row.first, row.m
    left = list(range((len(x) - first) // m))
    score, through = None, []
    for b in range(tap + 1):
        patches = torch.tensor([u * m + i for u in left for i in range(m)])
        through.append(len(patches))
        q, k, v, scale, after = row.blocks[b](x, patches)
        logits = q @ k.transpose(1, 2) * scale
        if (sees := row.sees[b]) is not None:
            logits = logits.masked_fill(~sees[patches][:, patches], -math.inf)
        x = after(logits.softmax(-1) @ v)
        if b == tap:
            break
        size = v[:, first:].mean(0).abs().sum(-1)
        if first:
            a = (q[:, :1] @ k.transpose(1, 2) * scale).softmax(-1).mean(0)[0, 1:]
            g = (v[:, :1] @ v.transpose(1, 2)).softmax(-1).mean(0)[0, 1:]
            new = (a / a.sum() + g / g.sum()) * size
        else:
            a = (q.mean(1, keepdim=True) @ k.transpose(1, 2) * scale).softmax(-1).mean(0)[0]
            new = a * size
        new = new.view(-1, m).mean(-1)
        score = new if score is None else 0.5 * score + 0.5 * new
        remaining, n = tap - 1 - b, len(left)
        if remaining % 2:
            continue
        if remaining:
            p = (a / a.sum()).double()
            spread = float(-(p * p.log()).sum()) / math.log(n * m)
            amount = (n - target) * m / math.sqrt(remaining) * (1 - spread**2)
            dropped = yield round(amount / m) if n > target else 0
        else:
            dropped = n
        stay = min(n, max(n - dropped, target))
        keep = sorted(sorted(range(n), key=lambda u: (-float(score[u]), u))[:stay])
        rows = [*range(first), *(first + u * m + i for u in keep for i in range(m))]
        x, score, left = x[rows], score[keep], [left[u] for u in keep]
    return left, through, x[first:]


def target_of(rows: list[Row], tokens: int, keep: float) -> int:
    wanted = max(1, math.floor(keep * tokens + 0.5))
    if len(rows) > 1:
        return wanted // 2
    return wanted if rows[0].first else min(2 * wanted, tokens)


def on_canvas(units: list[int], side: int, height: int, width: int) -> list[int]:
    """Patches of a thumbnail and crops of side×side as tokens of a thumbnail and the canvas, of
    2×2, 1×2 or 2×1 crops, which the picture fills."""
    wide, n = 2 if width >= height else 1, side * side
    found = []
    for unit in units:
        crop, y, x = unit // n - 1, unit % n // side, unit % side
        at = (crop // wide * side + y) * wide * side + crop % wide * side + x
        found.append(unit if crop < 0 else n + at)
    return sorted(found)


def projector(model: Any, family: str) -> Callable[[Tensor], Tensor] | None:
    """From patches behind the tap to LLM tokens; None where crops are packed anew."""
    if family in PINPOINTS:
        return None
    if family.startswith("qwen"):
        return model.model.visual.merger
    if family == "internvl":
        norm, project = model.model.vision_tower.layernorm, model.model.multi_modal_projector
        return lambda x: project(norm(x).view(-1, 4 * x.shape[-1]))
    return model.model.multi_modal_projector


CASES: dict[str, list[list[Any]]] = {
    "one": [[3, ("image", 24, 48), 5]],
    "ragged": [[4, ("image", 24, 24), 2, ("image", 48, 24), 5], [2, ("image", 48, 48), 9], [7]],
}


@torch.no_grad()
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("keep", [0.2, 0.45])
@pytest.mark.parametrize("family", FAMILIES)
def test_flowcut_equals_its_plain_statement(family: str, keep: float, case: str) -> None:
    model = build_model(family, blocks=8)
    # canvases of OneVision that are made smaller are refused: its images here are thumbnails
    rows_of = CASES[case][:1] if family == "llava_onevision" else CASES[case]
    inputs, seen = build_inputs(family, rows_of), []

    def see(module: Any, args: Any, kwargs: Any) -> None:
        seen.append(kwargs["inputs_embeds"])

    # hooks run in order of registration: this one sees what the patched model hands on
    hook = model.model.language_model.register_forward_pre_hook(see, with_kwargs=True)
    with vtc.patch(model, "flowcut", keep) as handle:
        model.generate(**inputs, max_new_tokens=1, do_sample=False, suppress_tokens=PLACEHOLDERS)
    hook.remove()
    selection, report = handle.token_selections[0], handle.report()
    embeds = visual_embeds(seen[-1], model, family, inputs, selection)
    if family.startswith("qwen"):
        rows = qwen_rows(model, inputs["pixel_values"], inputs["image_grid_thw"])
    elif family == "internvl":
        rows = internvl_rows(model, inputs, [n // 9 for n in selection.lengths])
    else:
        rows = llava_rows(model, inputs)
    tap = {"llava": 6, "llava_siglip": 6, "llava_next": 6}.get(family, 7)
    patches = [0] * (tap + 1)
    for g, (of_image, n) in enumerate(zip(rows, selection.lengths, strict=True)):
        units, found = 0, []
        plain = flowcut(of_image, tap, target_of(of_image, n, keep))
        for row, (left, through, features) in zip(of_image, plain, strict=True):
            found += [units + u for u in left]
            units += (len(row.hidden) - row.first) // row.m
            if (project := projector(model, family)) is not None:
                kept = embeds[: len(left)]
                torch.testing.assert_close(kept, project(features), atol=1e-4, rtol=1e-4)
                embeds = embeds[len(left) :]
            patches = [a + b for a, b in zip(patches, through, strict=True)]
        if family in PINPOINTS:
            side = CROP[family] // PATCH
            found = on_canvas(found, side, *inputs["image_sizes"][g].tolist())
        assert selection.keep[g, selection.valid[g]].tolist() == found, (family, g)
    assert list(report.block_patches[: tap + 1]) == patches
    assert report.block_patches[0] > report.block_patches[tap]


@torch.no_grad()
@pytest.mark.parametrize("family", FAMILIES)
def test_what_a_cut_left_in_patches_is_what_it_left_in_tokens(family: str) -> None:
    """Patches of a token live or die together; they are numbered as they stand in the input."""
    model = build_model(family, blocks=8)
    rows: list[list[Any]] = [[3, ("image", 24, 48), 5], [2, ("image", 24, 24), 4]]
    # a canvas of OneVision that is made smaller is refused
    inputs = build_inputs(family, rows[:1] if family == "llava_onevision" else rows)
    with vtc.patch(model, "flowcut", 0.3) as handle:
        model.generate(**inputs, max_new_tokens=1, do_sample=False, suppress_tokens=PLACEHOLDERS)
    patches, tokens = handle.selections[0], handle.token_selections[0]
    assert handle.selections[1:] == handle.token_selections[1:]
    grid = {"internvl": 4}.get(family, 4 if family.startswith("qwen") else 1)
    for g, n in enumerate(patches.lengths):
        t, h, w = patches.grid[g]
        assert n == t * h * w
        kept = patches.keep[g, patches.valid[g]]
        assert len(kept) == grid * int(tokens.valid[g].sum())
        if family.startswith("qwen"):  # four patches of a token stand together
            assert (kept // 4).unique().tolist() == tokens.keep[g, tokens.valid[g]].tolist()
        elif family == "internvl":  # tiles of side×side patches, tokens are blocks of 2×2
            tile, y, x = kept // (h * w), kept % (h * w) // w, kept % w
            block = (tile * (h // 2) + y // 2) * (w // 2) + x // 2
            assert block.unique().tolist() == tokens.keep[g, tokens.valid[g]].tolist()
        elif family in ("llava", "llava_siglip"):
            assert torch.equal(patches.mask()[g], tokens.mask()[g])


def visual_embeds(
    embeds: Tensor, model: Any, family: str, inputs: Any, selection: vtc.Selection
) -> Tensor:
    """The visual tokens among the short embeddings `[B, L, D]`, image by image."""
    stays = kept_columns(model, family, inputs, selection) & inputs["attention_mask"].bool()
    rank = stays.cumsum(-1) - 1 + embeds.shape[1] - stays.sum(-1, keepdim=True)
    places = [p[stays[tuple(p.T)]] for p in visual_places(model, family, inputs)]
    return torch.cat([embeds[p[:, 0], rank[tuple(p.T)]] for p in places])


def test_where_nothing_is_dropped_padding_of_a_canvas_stays() -> None:
    # noise, of which no patch follows from others, on a canvas that is wider than the image
    model, inputs = build_model("llava_next"), build_inputs("llava_next", [[3, ("image", 40, 24)]])
    with torch.no_grad():
        want = model(**inputs).logits
        with vtc.patch(model, "pixelprune"):
            assert torch.equal(model(**inputs).logits, want)
