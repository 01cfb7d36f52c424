"""VScan's choice before the LLM and what it merges, against loops."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import vtc
from tests.methods.test_layer_methods import facts
from vtc.errors import OptionError
from vtc.selectors.local_global import LocalGlobal, merged_into_nearest
from vtc.types import Budget, Selection, Tokens


def tokens(grids: list[tuple[int, int]], seed: int, extra: int = 1) -> Tokens:
    width = max(h * w for h, w in grids) + extra
    draw = torch.Generator().manual_seed(seed)
    valid = torch.arange(width) < torch.tensor([h * w for h, w in grids])[:, None]
    scores, early = torch.rand(2, len(grids), 1, width, generator=draw)
    features = torch.randn(len(grids), width, 4, generator=draw)
    features[~valid] = float("nan")
    return Tokens(
        features=features,
        valid=valid,
        grid=tuple((1, h, w) for h, w in grids),
        parent=torch.tensor([[g, g] for g in range(len(grids))]),
        signals={
            "cls_row": scores,
            "early_row": early,
            "encoder_row": torch.zeros(valid.shape, dtype=torch.int64),
        },
    )


GRIDS = st.lists(st.tuples(st.integers(1, 9), st.integers(1, 9)), min_size=1, max_size=3)


@given(GRIDS, st.integers(0, 99), st.floats(0.02, 1.0))
def test_windows_give_alike_and_the_rest_are_the_highest(
    grids: list[tuple[int, int]], seed: int, keep: float
) -> None:
    given = tokens(grids, seed)
    counts = Budget.of(keep).counts(given.lengths)
    scores = given.signals["cls_row"][:, 0]
    found = LocalGlobal()(given, scores, counts)
    for g, (h, w) in enumerate(grids):
        count, early = int(counts[g]), given.signals["early_row"][g, 0].tolist()
        kept = set(found.keep[g, found.valid[g]].tolist())
        assert len(kept) == count
        windows: dict[tuple[int, int], list[int]] = {}
        for i in range(h * w):
            at = (i // w * 4 // h, i % w * 4 // w)
            windows.setdefault(at, []).append(i)
        # as many rounds as it takes, in each the best left of every window, the best first
        local: list[int] = []
        while len(local) < count // 2:
            best = [
                max((i for i in own if i not in local), key=lambda i: (early[i], -i))
                for own in windows.values()
                if set(own) - set(local)
            ]
            if len(best) > count // 2 - len(local):
                break
            local += best
        assert set(local) <= kept
        number = {at: len(kept & set(own)) for at, own in windows.items()}
        assert sum(number.values()) == count


@given(GRIDS, st.integers(0, 99), st.floats(0.02, 1.0))
def test_merging_conserves_the_weighted_sum(
    grids: list[tuple[int, int]], seed: int, keep: float
) -> None:
    given = tokens(grids, seed)
    counts = Budget.of(keep).counts(given.lengths)
    found = LocalGlobal()(given, given.signals["cls_row"][:, 0], counts)
    assert found.merge is not None
    slot, token, weight = found.merge
    for g, n in enumerate(given.lengths):
        sizes = torch.zeros(len(found.keep[g])).index_add(0, slot[g, :n], torch.ones(n))
        merged = found.apply(given.features)[g, : int(counts[g])]
        whole = (merged * sizes[: int(counts[g]), None]).sum(0)
        torch.testing.assert_close(whole, given.features[g, :n].sum(0), atol=1e-4, rtol=1e-4)
        assert not weight[g, n:].any()
        unit = torch.nn.functional.normalize(given.features[g, :n], dim=-1)
        kept = found.keep[g, found.valid[g]].tolist()
        for i in range(n):
            into = kept[int(slot[g, i])]
            assert into == i if i in kept else True
            if i not in kept:
                best = max(float(unit[i] @ unit[k]) for k in kept)
                assert float(unit[i] @ unit[into]) >= best - 1e-6
    assert token[0, :3].tolist() == [0, 1, 2][: token.shape[1]]


def test_a_kept_token_stays_with_itself_whatever_equals_it() -> None:
    given = tokens([(2, 2)], 0)
    given.features[:] = 1.0
    kept = Selection.of_mask(
        torch.tensor([[False, True, True, False, False]]), (4,), given.parent, given.grid
    )
    found = merged_into_nearest(given, kept)
    assert found.merge is not None
    assert found.merge[0][0, :4].tolist() == [0, 0, 1, 0]


@pytest.mark.parametrize("options, keep", [({}, 32), ({"budget": "layer_mean"}, 64)])
def test_the_published_counts(options: dict[str, Any], keep: int) -> None:
    """96 into the LLM and 32 behind layer 16 are 64 on average."""
    method: Any = vtc.method("vscan", **options).on(facts())
    assert method.cuts(facts()) == (15,)
    assert method.entering(576, keep / 576, facts()) == 96
    assert method.wanted(576, Budget.of(keep), facts()) == (32,)
    selection = method.select(tokens([(24, 24)], 1), Budget.of(keep))
    assert selection.slots.tolist() == [96]


def test_official_windows_round_down() -> None:
    given = tokens([(24, 24)], 1)
    count = lambda n: LocalGlobal(equal=True)(  # noqa: E731
        given, given.signals["cls_row"][:, 0], torch.tensor([n])
    ).slots.tolist()
    assert count(96) == [96] and count(90) == [45 - 45 % 16 + 45]


def test_what_vscan_refuses() -> None:
    with pytest.raises(OptionError, match=r"ratio=0\.5, expected at least 1"):
        vtc.method("vscan", ratio=0.5)
    with pytest.raises(OptionError, match="scorer or selector, expected none"):
        vtc.method("vscan", scorer="random")
