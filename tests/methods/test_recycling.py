"""Density peaks, and what SparseVLM makes of tokens that it drops."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from sklearn.neighbors import NearestNeighbors

from tests.methods.test_layer_methods import ROWS, built, facts, seen
from vtc import ops
from vtc.entrance import Entrance
from vtc.mergers.clusters import cluster_count, recyclable
from vtc.scorers.raters import _turned_ones, rater_rows, rater_rows_corrected, raters
from vtc.selectors.density_peaks import density_peaks
from vtc.sites import LayerCut, LayerView
from vtc.types import Budget


def points(seed: int, n: int) -> torch.Tensor:
    return torch.randn(n, 5, generator=torch.Generator().manual_seed(seed))


@given(st.integers(0, 99), st.integers(1, 24), st.integers(1, 6))
def test_density_peaks_equal_the_loop(seed: int, n: int, clusters: int) -> None:
    clusters = min(clusters, n)
    x = points(seed, n)
    tree = NearestNeighbors(n_neighbors=clusters).fit(x.numpy())
    near, _ = tree.kneighbors(x.numpy())
    density = torch.tensor([-(row**2 / 5).mean() for row in near]).exp().tolist()
    # two points that are nearest to each other are as dense: the first counts as the denser
    rank = [(round(dense, 5), -i) for i, dense in enumerate(density)]
    distance = [[float((a - b).norm()) / 5**0.5 for b in x] for a in x]
    scores = []
    for i in range(n):
        denser = [j for j in range(n) if rank[j] > rank[i]]
        far = min((distance[i][j] for j in denser), default=max(map(max, distance)))
        scores.append(density[i] * far)
    want = sorted(range(n), key=lambda i: -round(scores[i], 5))[:clusters]
    centers, belongs = density_peaks(x, clusters, clusters)
    assert centers.tolist() == sorted(want)
    for i in range(n):
        own = float(distance[i][centers[belongs[i]]])
        assert own <= min(distance[i][c] for c in centers.tolist()) + 1e-6
    assert belongs[centers].tolist() == list(range(clusters))


def test_equal_points_are_told_apart_by_their_order() -> None:
    x = torch.zeros(6, 3)
    centers, belongs = density_peaks(x, 2, 2)
    assert centers.tolist() == [0, 1] and belongs.tolist() == [0, 1, 0, 0, 0, 0]


@given(st.integers(2, 600), st.data())
def test_kept_and_clusters_fill_the_count(n: int, data: st.DataObject) -> None:
    count = data.draw(st.integers(1, n))
    clusters = cluster_count(n, count)
    kept = count - clusters
    assert 0 <= clusters <= count and (clusters == 0) == (count in (1, n))
    if clusters and clusters != count // 2:
        assert clusters == (int(0.3 * (n - kept)) + 1) // 10 + 1
    assert clusters <= max(recyclable(n - kept), 1)


@pytest.mark.parametrize("last, wholes", [(18, (66, 30, 17)), (113, (300, 200, 110))])
@pytest.mark.parametrize("variant", ["v1"])
def test_the_published_schedules(last: int, wholes: tuple[int, ...], variant: str) -> None:
    """What stays as it is of 576; clusters are counted besides."""
    totals = built("sparsevlm", variant=variant).wanted(576, Budget.of(last), facts())
    there = 576
    for total, whole in zip(totals, wholes, strict=True):
        assert total - cluster_count(there, total) == whole
        there = total


@pytest.mark.parametrize("row", [(66, 34, 20), (246, 54, 28), (238, 108, 60), (300, 200, 118)])
def test_the_published_schedules_without_clusters(row: tuple[int, ...]) -> None:
    method = built("sparsevlm", variant="plus")
    assert method.wanted(576, Budget.of(row[-1]), facts()) == row
    assert method.cuts(facts()) == (2, 6, 15)


def viewed(pad: str = "left", past: int = 0) -> LayerView:
    view = seen(built("sparsevlm"), ROWS, n=9, pad=pad, past=past)
    draw = torch.Generator().manual_seed(3)
    embeds = torch.randn(*view.mask.shape, 4, generator=draw)
    angle = torch.rand(*view.mask.shape, 4, generator=draw).repeat(1, 1, 2)
    entrance = Entrance(
        embeds=embeds,
        mask=view.mask,
        visual=view.visual,
        entry=torch.arange(view.mask.shape[1]).expand_as(view.mask),
        angles=(angle.cos(), angle.sin()),
    )
    return dataclasses.replace(view, entrance=lambda: entrance)


@pytest.mark.parametrize("pad", ["left", "right"])
def test_raters_equal_the_loop(pad: str) -> None:
    view = viewed(pad)
    assert view.entrance is not None
    embeds, got = view.entrance().embeds, raters(view)
    for b, row in enumerate(view.visual):
        visual = row.nonzero()[:, 0].tolist()
        text = [i for i in view.mask[b].nonzero()[:, 0].tolist() if visual and i > visual[-1]]
        total = [0.0] * len(text)
        for v in visual:
            weights = torch.tensor([float(embeds[b, v] @ embeds[b, t]) for t in text]).softmax(0)
            total = [a + float(w) for a, w in zip(total, weights, strict=True)]
        above = [t for t, m in zip(text, total, strict=True) if m > sum(total) / len(total)]
        assert got[b].nonzero()[:, 0].tolist() == (above or text)


@pytest.mark.parametrize("corrected", [False, True])
@pytest.mark.parametrize("past", [0, 3])
def test_rows_of_raters_equal_the_loop(corrected: bool, past: int) -> None:
    view = viewed(past=past)
    assert view.entrance is not None
    got = (rater_rows_corrected if corrected else rater_rows)(view)
    cosine, sine = view.entrance().angles
    first, second = cosine[..., :4] - sine[..., :4], cosine[..., 4:] + sine[..., 4:]
    turned = torch.cat([first, second], -1)
    torch.testing.assert_close(_turned_ones((cosine, sine)), turned)
    for g, (_, b) in enumerate(view.parent.tolist()):
        heads = []
        for h in range(2):
            rows = []
            for i in raters(view)[b].nonzero()[:, 0].tolist():
                there = [*range(past), *(past + j for j in range(i + 1) if view.mask[b, j])]
                weights = (view.key[b, h, there] @ view.query[b, h, i] * view.scale).softmax(0)
                row = torch.zeros(past + view.mask.shape[1])
                row[there] = weights
                if corrected:
                    row[past:] /= turned[b] @ turned[b, i]
                rows.append(row[past:])
            heads.append(torch.stack(rows).mean(0))
        if corrected:
            # 14 of 32 heads are one of two
            looks = [float(row[view.visual[b]].sum()) for row in heads]
            heads = [heads[looks.index(max(looks))]]
        want = torch.stack(heads).mean(0)[view.columns[g]]
        torch.testing.assert_close(got[g], want, atol=1e-6, rtol=1e-5)


def test_rows_of_nobody_are_zeros() -> None:
    view = viewed()
    nobody = torch.zeros_like(view.mask)
    rows = ops.causal_rows(view.query, view.key, view.scale, view.mask, nobody)
    assert not rows.any()


def test_clusters_are_means_of_what_was_dropped() -> None:
    """Weights of each cluster sum to 1, the scored ones are left alone, and the rest is gone."""
    view = seen(built("sparsevlm"), [[3, None, 4], [None, 2, None, 9]], n=40)
    assert view.hidden is not None
    view = dataclasses.replace(
        viewed(),
        **{f.name: getattr(view, f.name) for f in dataclasses.fields(view) if f.name != "entrance"},
    )
    draw = torch.Generator().manual_seed(1)
    entrance = Entrance(
        torch.randn(*view.mask.shape, 4, generator=draw),
        view.mask,
        view.visual,
        torch.arange(view.mask.shape[1]).expand_as(view.mask),
        (torch.ones(1), torch.zeros(1)),
    )
    view = dataclasses.replace(view, entrance=lambda: entrance)
    method = built("sparsevlm")
    cut = method.layer_cut(view, Budget.of(6))
    assert isinstance(cut, LayerCut) and cut.merges
    assert cut.keep.sum(-1).tolist() == [6, 6, 6]
    total = torch.zeros_like(cut.weight).scatter_add(1, cut.into, cut.weight)
    torch.testing.assert_close(total, cut.keep.float())
    clusters = cluster_count(40, 6)
    for g in range(3):
        members = (cut.weight[g] > 0) & ~cut.keep[g]
        assert int(members.sum()) == recyclable(40 - 6 + clusters) - clusters
