"""What is merged into what, against loops over tokens in Python floats."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import vtc
from tests.kit.matrix import cached_inputs, model_of, run
from vtc.mergers import Contextual, Neighbors, means, merged_pairs, nearest, with_clusters
from vtc.scorers import SinkFilter
from vtc.scorers.clip_relevance import ClipRelevance
from vtc.sites import Facts, LayerCut
from vtc.types import Tokens, round_half_up

sizes = st.lists(st.integers(1, 14), min_size=1, max_size=3)


def tokens_of(sizes: list[int], seed: int, extra: int = 0) -> Tokens:
    """Groups at random; padding is not a number."""
    width = max(sizes) + extra
    valid = torch.arange(width) < torch.tensor(sizes)[:, None]
    draw = torch.Generator().manual_seed(seed)
    parts = [torch.randn(len(sizes), width, 4, generator=draw) for _ in range(3)]
    x, keys, features = (p.masked_fill(~valid[..., None], math.nan) for p in parts)
    signals = {"mean_keys": keys, "keys": keys, "encoder_features": features}
    parent = torch.tensor([[g, g] for g in range(len(sizes))])
    return Tokens(x, valid, tuple((1, 1, n) for n in sizes), parent, signals=signals)


def cosine(a: list[float], b: list[float]) -> float:
    return sum(p * q for p, q in zip(a, b, strict=True)) / (math.hypot(*a) * math.hypot(*b))


def highest(scores: list[float], k: int) -> list[int]:
    return sorted(sorted(range(len(scores)), key=lambda i: (-scores[i], i))[:k])


@given(sizes=sizes, seed=st.integers(0, 99), extra=st.integers(0, 2))
def test_the_nearest_of_some(sizes: list[int], seed: int, extra: int) -> None:
    tokens = tokens_of(sizes, seed, extra)
    keys = tokens.signals["keys"]
    among = torch.rand(keys.shape[:2], generator=torch.Generator().manual_seed(seed)) < 0.4
    got = nearest(keys, tokens.valid, among)
    for g, n in enumerate(sizes):
        found = [j for j in range(n) if among[g, j]]
        for i in range(n if found else 0):
            rows = keys[g].double().tolist()
            assert int(got[g, i]) == max(found, key=lambda j: (cosine(rows[i], rows[j]), -j))


@given(sizes=sizes, seed=st.integers(0, 99), slots=st.integers(1, 4))
def test_means_sum_to_one(sizes: list[int], seed: int, slots: int) -> None:
    draw = torch.Generator().manual_seed(seed)
    owner = torch.randint(0, slots, (len(sizes), max(sizes)), generator=draw)
    members = torch.rand(owner.shape, generator=draw) < 0.6
    weight = means(owner, members, slots)
    sums = torch.zeros(len(sizes), slots).scatter_add(1, owner, weight)
    some = torch.zeros(len(sizes), slots).scatter_add(1, owner, members.float()) > 0
    torch.testing.assert_close(sums, some.float())
    assert (weight[~members] == 0).all()


def contextual(
    scores: list[float], keys: list[list[float]], t: int, share: float, cls: bool
) -> tuple[list[int], list[dict[int, float]]]:
    """Dominant tokens, and the weights in each contextual one."""
    c = min(round_half_up(t * share), t - cls)
    dominant = highest(scores, t - c - cls)
    rest = [i for i in range(len(scores)) if i not in dominant]
    step = max(1, len(rest) // c) if c else 1
    targets = rest[::step][:c]
    members: dict[int, list[int]] = {target: [] for target in targets}
    for i in rest:
        if i not in targets and targets:
            best = max(targets, key=lambda j: (cosine(keys[i], keys[j]), -j))
            members[best].append(i)
    found = []
    for target in targets:
        mine = members[target]
        found.append({target: 1.0, **{i: 1 / len(mine) for i in mine}})
    return dominant, found


@given(
    sizes=sizes,
    seed=st.integers(0, 99),
    share=st.sampled_from([0.0, 10 / 64, 0.5, 0.9]),
    keep=st.sampled_from([0.2, 0.5, 1.0]),
    cls=st.booleans(),
)
def test_contextual_tokens_equal_the_loop(
    sizes: list[int], seed: int, share: float, keep: float, cls: bool
) -> None:
    tokens = tokens_of(sizes, seed, 1)
    scores = torch.rand(tokens.valid.shape, generator=torch.Generator().manual_seed(seed + 1))
    counts = torch.tensor([max(1, round(keep * n)) for n in sizes])
    got = Contextual(share, cls)(tokens, scores, counts)
    assert got.sends_cls == cls and got.merged == "encoder"
    assert got.slots.tolist() == counts.tolist()
    assert got.merge is not None
    first = got.keep.shape[1]
    for g, n in enumerate(sizes):
        keys = tokens.signals["keys"][g, :n].double().tolist()
        want = contextual(scores[g, :n].tolist(), keys, int(counts[g]), share, cls)
        kept = got.keep[g, got.valid[g]].tolist()
        assert kept == [-1] * cls + want[0]
        slot, token, weight = (part[g] for part in got.merge)
        found: list[dict[int, float]] = [{} for _ in want[1]]
        for s, i, w in zip(slot.tolist(), token.tolist(), weight.tolist(), strict=True):
            if w:
                found[s - first][i] = w
        assert [sorted(f) for f in found] == [sorted(w) for w in want[1]]
        for mine, theirs in zip(found, want[1], strict=True):
            assert all(math.isclose(mine[i], theirs[i], rel_tol=1e-6) for i in theirs)
        behind = got.slot_positions[g, first:]
        assert behind[behind >= 0].tolist() == [next(iter(w)) for w in want[1]]


def quartile(values: list[float], share: float) -> float:
    at = share * (len(values) - 1)
    low = sorted(values)[math.floor(at)]
    return low + (at - math.floor(at)) * (sorted(values)[math.ceil(at)] - low)


@given(sizes=sizes, seed=st.integers(0, 99), count=st.integers(0, 5), stride=st.booleans())
def test_neighbors_equal_the_loop(sizes: list[int], seed: int, count: int, stride: bool) -> None:
    tokens = tokens_of(sizes, seed, 2)
    draw = torch.Generator().manual_seed(seed + 1)
    scores = torch.rand(tokens.valid.shape, generator=draw) ** 8
    got = Neighbors(count, stride)(tokens, scores, torch.tensor(sizes))
    out = got.apply(tokens.signals["encoder_features"].nan_to_num(0))
    for g, n in enumerate(sizes):
        a = scores[g, :n].double().tolist()
        x = tokens.signals["encoder_features"][g, :n].double()
        keys = tokens.signals["keys"][g, :n].double().tolist()
        q1, q3 = quartile(a, 0.25), quartile(a, 0.75)
        k = max(1, sum(value > q3 + 1.5 * (q3 - q1) for value in a))
        kept = set(highest(a, k))
        if stride:
            kept |= set(range(0, n - 1, max(1, n // k // 3)))
        want = []
        for i in sorted(kept):
            others = sorted(set(range(n)) - {i}, key=lambda j: (-cosine(keys[i], keys[j]), j))
            want.append(x[i] + sum((a[j] * x[j] for j in others[:count]), torch.zeros(4)))
        dropped = [j for j in range(n) if j not in kept]
        if dropped:
            want.append(sum((a[j] * x[j] for j in dropped), torch.zeros(4)))
        assert got.keep[g, got.valid[g]].tolist() == sorted(kept)
        there = got.slot_positions[g] >= 0
        torch.testing.assert_close(out[g, there], torch.stack(want).float(), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("selector", [Contextual(0.4), Neighbors(3)], ids=lambda s: s.name)
def test_merging_conserves_the_weighted_sum(selector: Any) -> None:
    """All slots together hold each token as often as the weights say, and kept copies once."""
    tokens = tokens_of([14, 9], 3)
    scores = torch.rand(2, 14, generator=torch.Generator().manual_seed(1)) ** 4
    got = selector(tokens, scores, torch.tensor([6, 4]))
    x = tokens.signals["encoder_features"].nan_to_num(0)
    assert got.merge is not None
    slot, token, weight = got.merge
    share = torch.zeros(2, 14).scatter_add(1, token, weight.float())
    sums = torch.zeros(2, got.slot_positions.shape[1]).bool()
    sums[torch.arange(2)[:, None].expand_as(slot)[weight != 0], slot[weight != 0]] = True
    copies = got.valid & ~sums[:, : got.keep.shape[1]]
    share = share + torch.zeros(2, 14).scatter_add(1, got.keep, copies.float())
    want = (share[..., None] * x).sum(1)
    torch.testing.assert_close(got.apply(x).sum(1), want, atol=1e-5, rtol=1e-5)


def test_cls_stands_in_front_of_its_image(tmp_path: Path) -> None:
    model, inputs = model_of("llava"), cached_inputs("llava", "ragged")
    said: list[Tensor] = []
    hook = model.model.language_model.register_forward_pre_hook(
        lambda module, args, kwargs: said.append(kwargs["inputs_embeds"]), with_kwargs=True
    )
    try:
        with vtc.patch(model, "visionzip", 8) as handle:
            run(model, inputs, max_new_tokens=1)
    finally:
        hook.remove()
    (selection,) = handle.selections
    assert selection.sends_cls and selection.keep[:, 0].tolist() == [-1, -1]
    tower = model.model.vision_tower(inputs["pixel_values"], output_hidden_states=True)
    cls = model.model.multi_modal_projector(tower.hidden_states[-2][:, 0])
    short = said[-1]
    for row, text in ((0, 4), (1, 2)):  # tokens of text before each image
        entries = short[row][short[row].abs().sum(-1) > 0]
        torch.testing.assert_close(entries[text], cls[row], atol=1e-5, rtol=1e-4)
    selection.save(tmp_path / "one.safetensors")
    again = vtc.Selection.load(tmp_path / "one.safetensors")
    assert again.sends_cls and again.merged == "encoder"
    assert torch.equal(again.keep, selection.keep)


def test_cls_is_sent_where_the_projector_takes_it() -> None:
    for family, sends in (("llava", True), ("llava_siglip", False), ("llava_next", False)):
        with vtc.patch(model_of(family), "visionzip", 8) as handle:
            run(model_of(family), cached_inputs(family, "batch 1"), max_new_tokens=1)
        assert handle.selections[0].sends_cls == sends
    with pytest.raises(vtc.VtcError, match="got cls=True, expected a model whose images are one"):
        vtc.patch(model_of("internvl"), "visionzip", 8, cls=True)
    with vtc.patch(model_of("llava"), "visionzip", 8, cls=False) as handle:
        run(model_of("llava"), cached_inputs("llava", "batch 1"), max_new_tokens=1)
    assert (handle.selections[0].keep >= 0).all()


@given(sizes=sizes, seed=st.integers(0, 99), extra=st.integers(0, 2), data=st.data())
def test_pairs_conserve_the_sum_over_all_they_stand_for(
    sizes: list[int], seed: int, extra: int, data: st.DataObject
) -> None:
    tokens = tokens_of(sizes, seed, extra)
    x, valid = tokens.features.nan_to_num(), tokens.valid
    amounts = torch.tensor([data.draw(st.integers(0, n - 1)) for n in sizes])
    draw = torch.Generator().manual_seed(seed)
    size = torch.randint(1, 9, valid.shape, generator=draw).float()
    keep, into, weight, grown = merged_pairs(
        tokens.features, valid, amounts, size, torch.tensor(sizes)
    )
    assert keep.sum(1).tolist() == [n - int(a) for n, a in zip(sizes, amounts, strict=True)]
    at = into[..., None].expand_as(x)
    merged = torch.zeros_like(x).scatter_add(1, at, x * weight[..., None])
    before = (x * size[..., None] * valid[..., None]).sum(1)
    after = (merged * (grown * keep)[..., None]).sum(1)
    torch.testing.assert_close(after, before, atol=1e-4, rtol=1e-5)
    assert keep.gather(1, into)[valid].all()
    assert (grown * keep).sum(1).tolist() == (size * valid).sum(1).tolist()


@given(sizes=sizes, seed=st.integers(0, 99), sized=st.booleans())
def test_clusters_go_on_as_means_over_their_members(
    sizes: list[int], seed: int, sized: bool
) -> None:
    draw = torch.Generator().manual_seed(seed)
    valid = torch.arange(max(sizes) + 1) < torch.tensor(sizes)[:, None]
    kept = valid & (torch.rand(valid.shape, generator=draw) < 0.4)
    clusters: list[tuple[int, Tensor, Tensor]] = []
    members: dict[tuple[int, int], list[int]] = {}
    for g in range(0, len(sizes), 2):
        (at,) = (valid[g] & ~kept[g]).nonzero(as_tuple=True)
        centers = torch.rand(len(at), generator=draw) < 0.4
        owner = torch.full((len(at),), -1)
        for i in range(len(at) if centers.any() else 0):
            among = [-1, *centers.nonzero()[:, 0].tolist()]
            pick = int(torch.randint(0, len(among), (1,), generator=draw))
            owner[i] = i if centers[i] else among[pick]
        clusters.append((g, at, owner))
        for i, c in enumerate(owner.tolist()):
            if c >= 0:
                members.setdefault((g, int(at[c])), []).append(int(at[i]))
    cut = with_clusters(LayerCut.alone(kept), clusters, sized)
    assert torch.equal(cut.keep & kept, kept) and (cut.size is not None) == sized
    assert {(g, c) for g, c in (cut.keep & ~kept).nonzero().tolist()} == set(members)
    for g, row in enumerate(kept):
        for i in range(len(row)):
            own = next((c for (of, c), parts in members.items() if of == g and i in parts), None)
            if own is None:
                assert float(cut.weight[g, i]) == float(row[i])
            else:
                assert int(cut.into[g, i]) == own
                assert float(cut.weight[g, i]) == pytest.approx(1 / len(members[g, own]))
            if cut.size is not None and cut.keep[g, i]:
                assert float(cut.size[g, i]) == len(members.get((g, i), [i]))


def test_parts_learn_the_model_where_they_are_asked() -> None:
    facts = Facts(24, 22, True, 1, False, 32, name="llm", projects=True)
    known = vtc.method("cdpruner", clip="clip").on(facts).active_scorer
    assert known == ClipRelevance("clip", "llm")
    given_one = vtc.method("cdpruner", clip="clip", tokenizer="own").on(facts)
    assert given_one.active_scorer == ClipRelevance("clip", "own")
    inside = vtc.method("cdpruner", clip="clip", scorer=SinkFilter(dims=())).on(facts)
    assert inside.active_scorer == SinkFilter(known, dims=())
    unasked = vtc.method("cdpruner", clip="clip", selector="uniform")
    assert unasked.on(facts) is unasked
    assert vtc.method("fastervlm").on(facts) == vtc.method("fastervlm")


def test_nothing_chooses_among_what_was_merged() -> None:
    for name, keep in (("prumerge", None), ("visionzip", 0.5)):
        with pytest.raises(vtc.VtcError, match="put the stage that merges last"):
            vtc.compose((name, keep), ("random", 4))
