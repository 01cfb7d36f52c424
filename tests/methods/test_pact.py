"""PACT and its clusters against loops that follow the published recursion."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import vtc
from tests.kit.models import build_model
from tests.kit.prompts import build_inputs
from tests.methods.test_layer_methods import ROWS, facts
from tests.methods.views import layer_view
from vtc.entrance import Heads
from vtc.errors import OptionError, SignalError
from vtc.selectors.bounded_clusters import bounded_clusters, cosine_distances
from vtc.sites import LayerCut
from vtc.types import Budget


def recursion(distance: list[list[float]], cutoff: float, small: int) -> set[int]:
    """Rounds: centers are farther than the cutoff from anything denser; what is near them goes.
    Rounds of fewer than `small` centers turn to one point after the other."""
    n = len(distance)
    density = [sum(float(torch.tensor(-((d / 2) ** 2)).exp()) for d in row) for row in distance]
    rank = sorted(range(n), key=lambda i: (-round(density[i], 5), i))
    left, centers = list(rank), set()
    while left:
        found = [i for at, i in enumerate(left) if all(distance[i][j] > cutoff for j in left[:at])]
        if len(found) < small:
            for i in left:
                if all(distance[i][c] > cutoff for c in centers):
                    centers.add(i)
            return centers
        centers |= set(found)
        left = [i for i in left if all(distance[i][c] > cutoff for c in found)]
    return centers


@given(st.integers(0, 99), st.integers(1, 20), st.floats(0.05, 1.2), st.sampled_from([0, 3, 10]))
def test_centers_equal_the_published_recursion(
    seed: int, n: int, cutoff: float, small: int
) -> None:
    x = torch.randn(n, 3, generator=torch.Generator().manual_seed(seed))
    distance = cosine_distances(x)
    got = bounded_clusters(distance, cutoff).nonzero()[:, 0].tolist()
    assert set(got) == recursion(distance.tolist(), cutoff, small)
    for i in range(n):
        assert min(float(distance[i, c]) for c in got) <= cutoff
        assert i not in got or all(float(distance[i, c]) > cutoff for c in got if c != i)


def test_equal_points_are_one_cluster() -> None:
    assert bounded_clusters(torch.zeros(5, 5), 0.1).tolist() == [True, *[False] * 4]


@pytest.mark.parametrize("past", [0, 3])
def test_pact_equals_the_loop(past: int) -> None:
    method: Any = vtc.method("pact", cutoff=0.4)
    view = layer_view(ROWS, n=13, past=past, layer=3)
    plain, turned = (layer_view(ROWS, n=13, past=past, seed=s) for s in (5, 6))
    hidden = torch.zeros(*view.mask.shape, 8)
    for b, row in enumerate(view.mask):
        hidden[b, row] = plain.value[b, 0, past:][row]

    def ahead(rotary: bool) -> Heads:
        seen = turned if rotary else plain
        return Heads(seen.query, seen.key, seen.value, seen.scale)

    view = dataclasses.replace(view, hidden=hidden, facts=facts(), ahead=ahead)
    cut = method.layer_cut(view, Budget(None))
    assert isinstance(cut, LayerCut) and cut.size is not None
    for g, (_, b) in enumerate(view.parent.tolist()):
        own = view.columns[g].tolist()
        score = torch.zeros(13)
        for h in range(2):
            mean = torch.stack([plain.query[b, h, i] for i in own]).mean(0)
            logits = torch.stack([plain.key[b, h, past + i] @ mean for i in own]) * plain.scale
            score += logits.softmax(0) / 2
        score = score * torch.stack([hidden[b, i].norm() for i in own])
        important = sorted(sorted(range(13), key=lambda i: -float(score[i]))[:7])
        keys = torch.stack([turned.key[b, :, past + i].flatten() for i in own])
        distance = cosine_distances(keys)
        among = distance[important][:, important].tolist()
        centers = sorted(important[i] for i in recursion(among, 0.4, 10))
        assert cut.keep[g].nonzero()[:, 0].tolist() == centers
        members: dict[int, list[int]] = {c: [] for c in centers}
        for i in range(13):
            nearest = min(centers, key=lambda c: float(distance[i, c]))
            nearest = i if i in centers else nearest
            if float(distance[i, nearest]) <= 0.6:
                members[nearest].append(i)
            else:
                assert cut.weight[g, i] == 0
        for center, parts in members.items():
            assert [i for i in parts if cut.into[g, i] != center] == []
            for i in parts:
                assert float(cut.weight[g, i]) == pytest.approx(1 / len(parts))
            assert float(cut.size[g, center]) == len(parts)


def test_sizes_count_in_attention() -> None:
    """Else nothing would depend on the option."""
    model, inputs = build_model("llava"), build_inputs("llava", [[3, "image", 4]])
    found = []
    for proportional in (True, False):
        with torch.no_grad(), vtc.patch(model, "pact", cutoff=0.6, proportional=proportional):
            found.append(model(**inputs).logits[:, -1])
    assert not torch.allclose(*found, atol=1e-4)


def test_what_pact_refuses() -> None:
    with pytest.raises(OptionError, match=r"importance=0\.0"):
        vtc.method("pact", importance=0.0)
    with pytest.raises(OptionError, match="decides by itself how much is kept"):
        vtc.method("pact").check_keep(0.5)
    with pytest.raises(SignalError, match="expected an LLM with layers behind it"):
        vtc.method("pact").check_facts(facts(1))
