"""Budget, Selection and Tokens keep what they promise."""

from __future__ import annotations

import json
import math
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from vtc.errors import OptionError, SignalError
from vtc.selectors.grid_pool import largest_grid, pooled_cells
from vtc.types import Budget, Selection, Tokens, scale_layer


@pytest.mark.parametrize(
    "keep, n, want",
    [
        (0.5, 5, 3),
        (0.1, 4, 1),
        (0.111, 576, 64),
        (1.0, 7, 7),
        (64, 36, 36),
        (1, 36, 1),
        (0.0001, 9, 1),
        (0.25, 10, 3),
    ],
)
def test_counts(keep: float, n: int, want: int) -> None:
    assert Budget.of(keep).count(n) == want


@given(st.floats(0.001, 1.0), st.lists(st.integers(0, 40), min_size=1, max_size=6))
def test_an_image_of_several_groups_shares_one_budget(keep: float, sizes: list[int]) -> None:
    valid = torch.arange(40) < torch.tensor(sizes)[:, None]
    one_image = torch.zeros(len(sizes), 2, dtype=torch.int64)
    counts = Budget.of(keep).counts(valid, one_image)
    assert counts.sum() == Budget.of(keep).count(sum(sizes))
    assert all(0 <= c <= n for c, n in zip(counts.tolist(), sizes, strict=True))
    exact = torch.tensor(sizes, dtype=torch.float64) * (int(counts.sum()) / max(sum(sizes), 1))
    assert ((counts - exact).abs() < 1 + 1e-9).all()


@given(st.integers(1, 60), st.lists(st.integers(0, 9), min_size=1, max_size=5))
def test_largest_remainder_is_exact(keep: int, sizes: list[int]) -> None:
    """With fractions instead of floats: equal remainders go to the lower group."""
    total = sum(sizes)
    wanted = min(keep, total)
    exact = [Fraction(wanted * n, max(total, 1)) for n in sizes]
    shares = [int(e) for e in exact]
    order = sorted(range(len(sizes)), key=lambda g: (shares[g] - exact[g], g))
    for g in order[: wanted - sum(shares)]:
        shares[g] += 1
    valid = torch.arange(9) < torch.tensor(sizes)[:, None]
    one_image = torch.zeros(len(sizes), dtype=torch.int64)
    assert Budget.of(keep).counts(valid, one_image).tolist() == shares


def test_equal_remainders_go_to_the_lower_group() -> None:
    valid = torch.arange(7) < torch.tensor([1, 1, 7])[:, None]
    # 3·1/9, 3·1/9 and 3·7/9 all leave a third, which floats would rank
    assert Budget.of(3).counts(valid, torch.zeros(3).long()).tolist() == [1, 0, 2]


@pytest.mark.parametrize(
    "keep, want",
    [
        (np.float32(0.5), 18),
        (np.float64(0.5), 18),
        (np.int64(5), 5),
        (Fraction(1, 4), 9),
        (10**30, 36),
        (5e-324, 1),
    ],
)
def test_numbers_of_other_libraries(keep: Any, want: int) -> None:
    budget = Budget.of(keep)
    assert budget.count(36) == want
    json.dumps(budget.keep)


def test_images_have_budgets_of_their_own() -> None:
    valid = torch.arange(10) < torch.tensor([10, 4, 6])[:, None]
    parent = torch.tensor([[0, 0], [1, 0], [1, 0]])
    assert Budget.of(5).counts(valid, parent).tolist() == [5, 2, 3]
    assert Budget.of(5).counts(valid).tolist() == [5, 4, 5]


@pytest.mark.parametrize(
    "keep",
    [
        *(0, -3, 1.5, 0.0, float("nan"), float("inf"), -float("inf"), "half", "0.5", True, [1], 1j),
        *(np.bool_(True), np.array(0.5), torch.tensor(0.5), torch.tensor(5)),
    ],
)
def test_bad_keep(keep: object) -> None:
    with pytest.raises(OptionError, match=r"expected .*pass a float in \(0, 1\]"):
        Budget.of(keep)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "layer, published, depth, want",
    [(16, 24, 24, 16), (16, 24, 6, 4), (1, 32, 4, 1), (0, 32, 4, 0)],
)
def test_scale_layer(layer: int, published: int, depth: int, want: int) -> None:
    assert scale_layer(layer, published, depth) == want


def test_a_missing_signal_names_those_that_exist() -> None:
    tokens = Tokens(
        torch.zeros(1, 2, 3),
        torch.ones(1, 2, dtype=torch.bool),
        ((1, 1, 2),),
        torch.zeros(1, 2).long(),
        signals={"image_key": torch.zeros(1)},
    )
    with pytest.raises(SignalError, match=r"'cls_row' was not captured; there is .'image_key'."):
        tokens.signal("cls_row")


def merging_selection() -> Selection:
    """Two groups of 5 and 3 tokens; the first keeps 2 (one merged with token 3) and appends a
    mean."""
    return Selection(
        keep=torch.tensor([[0, 2], [1, 0]]),
        valid=torch.tensor([[True, True], [True, False]]),
        lengths=(5, 3),
        parent=torch.tensor([[0, 0], [1, 1]]),
        grid=((1, 1, 5), (1, 1, 3)),
        positions=torch.tensor([[0, 2, 4], [1, -1, -1]]),
        merge=(
            torch.tensor([[1, 1, 2, 2], [0, 0, 0, 0]]),
            torch.tensor([[2, 3, 1, 4], [0, 0, 0, 0]]),
            torch.tensor([[0.75, 0.25, 0.5, 0.5], [0, 0, 0, 0]]),
        ),
    )


def test_apply_gathers_and_merges() -> None:
    x = torch.arange(10.0).reshape(2, 5, 1)
    got = merging_selection().apply(x)[..., 0]
    assert got.tolist() == [[0.0, 2.25, 2.5], [6.0, 0.0, 0.0]]


def test_padding_pairs_carry_nothing() -> None:
    x = torch.arange(10.0).reshape(2, 5, 1)
    x[1, 0] = float("nan")  # token 0 of the second group, whose pairs are all padding
    got = merging_selection().apply(x)[..., 0]
    assert got.tolist() == [[0.0, 2.25, 2.5], [6.0, 0.0, 0.0]]


def test_apply_is_the_weighted_sum_and_differentiable() -> None:
    selection = merging_selection()
    x = torch.randn(2, 5, 2, 3, dtype=torch.float64, requires_grad=True)
    got = selection.apply(x)
    want = torch.stack([x[0, 0], x[0, 2] * 0.75 + x[0, 3] * 0.25, (x[0, 1] + x[0, 4]) / 2])
    torch.testing.assert_close(got[0], want, atol=1e-6, rtol=0)
    (grad,) = torch.autograd.grad(got.sum(), x)
    assert grad[0, :, 0, 0].tolist() == [1.0, 0.5, 0.75, 0.25, 0.5]


def test_masks() -> None:
    selection = merging_selection()
    assert selection.mask().int().tolist() == [[1, 0, 1, 0, 0], [0, 1, 0, 0, 0]]
    assert selection.covered().int().tolist() == [[1, 1, 1, 1, 1], [0, 1, 0, 0, 0]]
    assert selection.slots.tolist() == [3, 1]
    assert not selection.is_identity


def test_save_and_load(tmp_path: Path) -> None:
    selection = merging_selection()
    selection.save(tmp_path / "s.safetensors")
    loaded = Selection.load(tmp_path / "s.safetensors")
    assert (loaded.lengths, loaded.grid, loaded.scores) == (selection.lengths, selection.grid, None)
    for name in ("keep", "valid", "parent", "positions"):
        assert torch.equal(getattr(loaded, name), getattr(selection, name))
    assert all(torch.equal(a, b) for a, b in zip(loaded.merge, selection.merge, strict=True))


@pytest.mark.parametrize(
    "h, w, budget, want",
    [
        (24, 24, 64, (8, 8)),
        (24, 24, 63, (7, 7)),
        (14, 14, 22, (4, 4)),
        (2, 3, 2, (1, 2)),
        (24, 36, 96, (8, 12)),
        (5, 1, 1, (1, 1)),
    ],
)
def test_largest_grid(h: int, w: int, budget: int, want: tuple[int, int]) -> None:
    assert largest_grid(h, w, budget) == want


def test_a_square_grid_shrinks_to_the_largest_square() -> None:
    assert [largest_grid(6, 6, b) for b in range(1, 37)] == [
        (math.isqrt(b), math.isqrt(b)) for b in range(1, 37)
    ]
    assert [largest_grid(24, 24, b) for b in (64, 128, 192)] == [(8, 8), (11, 11), (13, 13)]


@given(st.integers(1, 30), st.integers(1, 30), st.data())
def test_largest_grid_fits_and_is_stable(h: int, w: int, data: st.DataObject) -> None:
    budget = data.draw(st.integers(1, h * w))
    size = largest_grid(h, w, budget)
    assert size[0] * size[1] <= budget
    assert size[0] <= h and size[1] <= w
    assert largest_grid(h, w, size[0] * size[1]) == size


@given(st.integers(1, 12), st.integers(1, 12), st.data())
def test_pooling_is_adaptive_average_pooling(h: int, w: int, data: st.DataObject) -> None:
    t = data.draw(st.integers(1, 4))
    size = tuple(data.draw(st.integers(1, n)) for n in (t, h, w))
    slot, token, weight, center = pooled_cells((t, h, w), size)
    x = torch.rand(t * h * w, dtype=torch.float64)
    got = torch.zeros(math.prod(size), dtype=torch.float64).index_add_(
        0, slot, x[token] * weight.double()
    )
    want = torch.nn.functional.adaptive_avg_pool3d(x.view(1, t, h, w), size).flatten()
    torch.testing.assert_close(got, want, atol=1e-6, rtol=0)
    members = [set(token[slot == s].tolist()) for s in range(len(want))]
    assert all(int(c) in m for c, m in zip(center, members, strict=True))
