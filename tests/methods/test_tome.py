"""ToMe against its definition, pair by pair, and the encoder written out with it."""

from __future__ import annotations

import math
from itertools import pairwise
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.nn.functional import cosine_similarity

import vtc
from tests.kit.models import build_model
from tests.kit.prompts import build_inputs
from tests.methods.views import Rows
from vtc.errors import SignalError
from vtc.selectors.bipartite import bipartite_matches
from vtc.sites import Facts
from vtc.types import Budget


def matched(keys: Tensor, amount: int) -> dict[int, int]:
    """Of a row, who becomes part of whom."""
    n = len(keys)
    found = {}
    for i in range(0, n, 2):
        others = range(1, n, 2)
        if others:
            like = {j: round(float(cosine_similarity(keys[i], keys[j], 0)), 5) for j in others}
            partner = min(others, key=lambda j: (-like[j], j))
            found[i] = (like[partner], partner)
    order = sorted(found, key=lambda i: (-found[i][0], i))
    return {i: found[i][1] for i in order[:amount]}


@given(
    st.lists(st.tuples(st.integers(1, 9), st.integers(0, 6)), min_size=1, max_size=3),
    st.integers(0, 99),
)
def test_matches_equal_the_loop(rows: list[tuple[int, int]], seed: int) -> None:
    draw = torch.Generator().manual_seed(seed)
    width = max(n for n, _ in rows) + 1
    metric = torch.randn(len(rows), width, 4, generator=draw)
    valid = torch.arange(width) < torch.tensor([n for n, _ in rows])[:, None]
    metric[~valid] = float("nan")
    into = bipartite_matches(metric, valid, torch.tensor([r for _, r in rows]))
    for row, (n, r) in enumerate(rows):
        want = matched(metric[row, :n], r)
        got = {i: int(j) for i, j in enumerate(into[row]) if int(j) != i}
        assert got == want


@given(
    st.lists(st.integers(1, 12), min_size=1, max_size=3),
    st.sampled_from([1, 4]),
    st.booleans(),
    st.integers(1, 4),
)
def test_merging_conserves_what_every_patch_weighs(
    units: list[int], m: int, cls: bool, tap: int
) -> None:
    """Weights of each sum are 1, and sizes add up to the patches there were."""
    method, rows = vtc.method("tome"), Rows(units, m=m, cls=cls, tap=tap)
    left, carry = None, None
    for block in range(tap):
        view = rows.view(block, left, carry)
        cut = method.encoder_cut(view, Budget.of(0.3))
        if cut.keep is None:
            assert cut.into is None
            continue
        assert cut.into is not None and cut.weight is not None and cut.size is not None
        total = torch.zeros_like(cut.weight).scatter_add(1, cut.into, cut.weight)
        torch.testing.assert_close(total[cut.keep], torch.ones(int(cut.keep.sum())))
        sizes = cut.carry["size"].masked_fill(~cut.keep, 0).sum(-1)
        assert sizes.tolist() == [float(n) for n in units]
        kept = [row.nonzero()[:, 0] for row in cut.keep]
        left = [view.index[r, at].tolist() for r, at in enumerate(kept)]
        carry = {"size": [cut.carry["size"][r, at].tolist() for r, at in enumerate(kept)]}


def test_the_same_number_in_each_block() -> None:
    """576 to 64 in 22 blocks: 512 in all, 24 or 23 each."""
    method, rows = vtc.method("tome"), Rows([576], tap=22)
    left, carry, counts = None, None, [576]
    for block in range(22):
        view = rows.view(block, left, carry)
        cut = method.encoder_cut(view, Budget.of(64))
        assert cut.keep is not None
        at = cut.keep[0].nonzero()[:, 0]
        left, carry = [view.index[0, at].tolist()], {"size": [cut.carry["size"][0, at].tolist()]}
        counts.append(len(at))
    merged = [a - b for a, b in pairwise(counts)]
    assert sum(merged) == 512 and set(merged) == {23, 24}


def attended(layer: Any, x: Tensor, size: Tensor | None) -> tuple[Tensor, Tensor]:
    """The output of one CLIP block, and its keys averaged over heads, `[1 + n, d]`."""
    attention = layer.self_attn
    heads = attention.num_heads
    h = layer.layer_norm1(x)
    q, k, v = (
        p(h).unflatten(-1, (heads, -1)).transpose(0, 1)
        for p in (attention.q_proj, attention.k_proj, attention.v_proj)
    )
    logits = q @ k.transpose(1, 2) / math.sqrt(q.shape[-1])
    if size is not None:
        logits = logits + size.log()
    out = (logits.softmax(-1) @ v).transpose(0, 1).flatten(1)
    x = x + attention.out_proj(out)
    return x + layer.mlp(layer.layer_norm2(x)), k.mean(0)


def written_out(model: Any, pixels: Tensor, keep: int, proportional: bool) -> dict[int, Tensor]:
    """Tokens of one picture in front of the LLM, by the patch that they stand for."""
    tower, tap = model.model.vision_tower, 4
    x = tower.pre_layrnorm(tower.embeddings(pixels[None]))[0]
    patches = list(range(len(x) - 1))
    size = torch.ones(len(x))
    for block, layer in enumerate(tower.encoder.layers[: tap + 1]):
        x, keys = attended(layer, x, size if proportional else None)
        if block == tap:
            break
        amount = math.ceil((len(patches) - keep) / (tap - block))
        while amount > 0:
            pairs = matched(keys[1:], amount)
            amount -= len(pairs)
            new, grown = x.clone(), size.clone()
            for j in set(pairs.values()):
                parts = [j, *(i for i, to in pairs.items() if to == j)]
                grown[1 + j] = sum(size[1 + i] for i in parts)
                new[1 + j] = sum(size[1 + i] * x[1 + i] for i in parts) / grown[1 + j]
            stays = [0, *(1 + i for i in range(len(patches)) if i not in pairs)]
            patches = [patches[i - 1] for i in stays[1:]]
            x, size, keys = new[stays], grown[stays], keys[stays]
    projected = model.model.multi_modal_projector(x[None, 1:])[0]
    return dict(zip(patches, projected, strict=True))


@pytest.mark.parametrize("proportional", [True, False])
@pytest.mark.parametrize("keep", [12, 3])
def test_the_encoder_equals_it_written_out(keep: int, proportional: bool) -> None:
    model = build_model("llava")
    inputs = build_inputs("llava", [[3, "image", 4], [2, "image", "image", 5]])
    seen: list[dict[str, Any]] = []
    hook = model.model.language_model.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(kwargs), with_kwargs=True
    )
    with torch.no_grad(), vtc.patch(model, "tome", keep, proportional=proportional) as handle:
        model(**inputs)
        hook.remove()
        (selection,) = handle.token_selections
        found = []
        for g, pixels in enumerate(inputs["pixel_values"]):
            want = written_out(model, pixels, keep, proportional)
            kept = selection.keep[g, selection.valid[g]].tolist()
            assert kept == sorted(want) and len(kept) == keep
            found.append(torch.stack([want[i] for i in kept]))
    embeds, mask = seen[0]["inputs_embeds"], seen[0]["attention_mask"].bool()
    first = embeds[0][mask[0]][3 : 3 + keep]
    second = embeds[1][mask[1]][2 : 2 + 2 * keep]
    for got, want in ((first, found[0]), (second, torch.cat(found[1:]))):
        torch.testing.assert_close(got, want, atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("family", ["qwen2_vl", "qwen2_5_vl", "internvl", "llava_next"])
def test_sizes_count_in_every_encoder(family: str) -> None:
    """Else nothing would depend on the option."""
    model, inputs = build_model(family), build_inputs(family, [[3, "image", 4]])
    found = []
    for proportional in (True, False):
        with torch.no_grad(), vtc.patch(model, "tome", 0.3, proportional=proportional):
            found.append(model(**inputs).logits[:, -1])
    assert not torch.allclose(*found, atol=1e-4)


def test_no_block_to_merge_behind() -> None:
    with pytest.raises(SignalError, match="got block 0"):
        vtc.method("tome").check_facts(Facts(2, 0, True, 1, False, 4))
