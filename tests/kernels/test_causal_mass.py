"""`causal_mass`: the interpreted kernels against the reference."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from tests.kernels.test_attention import EXACT, allowed
from vtc import dispatch, ops

pytestmark = pytest.mark.filterwarnings("ignore:All-NaN slice encountered:RuntimeWarning")
REFERENCE: Any = ops.causal_mass.reference  # type: ignore[attr-defined]


class Case(NamedTuple):
    n: int  # entries
    d: int
    dtype: str = "float32"
    past: int = 0
    batch: int = 2
    heads: int = 2
    text: int = 9  # entries behind the image
    scattered: bool = False  # both kinds of entries anywhere, not as in a prompt
    keys: str = ""  # their dtype, where it is another one
    strided: bool = False

    def __str__(self) -> str:
        about = f"B{self.batch}-H{self.heads}-S{self.n}-T{self.n + self.past}-d{self.d}"
        more = [self.dtype, self.keys, "scattered" * self.scattered, "slice" * self.strided]
        return "-".join([about, *filter(None, more)])


CASES = [
    Case(1, 32),
    Case(1, 64, "float16", past=5, scattered=True),
    Case(63, 32, "bfloat16", past=10),
    Case(63, 80, "float16", text=70, scattered=True, strided=True),
    Case(217, 64, text=100, past=40),
    Case(217, 128, "float16", heads=1),
    Case(217, 72, keys="bfloat16", scattered=True, heads=1),
    Case(431, 256, "float16", heads=1, text=30),
    Case(431, 128, past=64, heads=1, strided=True),
    Case(577, 64, "float16", text=130, heads=3),
    Case(577, 128, "bfloat16", past=70, heads=1),
    Case(2880, 64, "float16", batch=1, heads=1, text=60),
]

Inputs = tuple[Tensor, Tensor, float, Tensor, Tensor, Tensor, Tensor]


def draw(case: Case, device: str = "cpu") -> Inputs:
    """A prompt padded at the left, behind a cache with gaps; what is padding holds NaN."""
    g = torch.Generator().manual_seed(case.n + case.d)
    length = case.n + case.past
    shape = (case.batch, length, 2, case.heads, case.d)
    if case.strided:  # every other slice of a fused projection, entries of a head not adjacent
        fused = torch.randn(*shape[:-2], case.d, 2 * case.heads, generator=g)[..., ::2].mT
    else:
        fused = torch.randn(shape, generator=g)
    at, row = torch.arange(case.n), torch.arange(case.batch)[:, None]
    mask = (at >= row * case.n // 7) | (at == case.n - 1)
    rows, onto = mask & (at >= case.n - case.text), mask & (at < case.n - case.text)
    onto &= at >= case.n // 4
    if case.scattered:
        rows, onto = (mask & (torch.rand(mask.shape, generator=g) < 0.4) for _ in range(2))
    held = torch.rand(case.batch, case.past, generator=g) < 0.7
    there = torch.cat([held, mask], 1)
    fused = fused.masked_fill(~there[:, :, None, None, None], float("nan")).to(device)
    q, k = fused[:, case.past :, 0].transpose(1, 2), fused[:, :, 1].transpose(1, 2)
    q, k = q.to(getattr(torch, case.dtype)), k.to(getattr(torch, case.keys or case.dtype))
    flags = (x.to(device) for x in (mask, rows, onto, held))
    return q, k, case.d**-0.5, *flags


def plain(
    q: Tensor, k: Tensor, scale: float, mask: Tensor, rows: Tensor, onto: Tensor, held: Tensor
) -> Tensor:
    """The full map as eager code has it, in the precision given, then the mean of what is asked."""
    if q.dtype != k.dtype:
        q, k = q.float(), k.float()
    at, found = torch.arange(q.shape[2], device=q.device), []
    for b in range(len(q)):
        own = rows[b].nonzero()[:, 0]
        before = held[b].expand(len(own), -1)
        seen = torch.cat([before, mask[b] & (at <= own[:, None])], 1)
        logits = q[b][:, own] @ k[b].mT * scale
        weights = logits.masked_fill(~seen, float("-inf")).softmax(-1)[..., len(held[b]) :]
        found.append(weights[..., onto[b]].sum(-1).sum() / max(1, len(own) * q.shape[1]))
    return torch.stack(found)


def assert_mass(case: Case, kernel: Callable[..., Tensor], device: str = "cpu") -> None:
    given = draw(case, device)
    got, truth = kernel(*given), REFERENCE(*given)
    assert got.dtype == torch.float32
    assert got.shape == truth.shape
    assert (got - truth).abs().max() <= allowed(plain(*given), truth)
    assert ((got >= 0) & (got <= 1 + EXACT)).all()


def alone(given: Inputs, b: int) -> list[Any]:
    """One row of a batch, in memory of its own."""
    return [x[b : b + 1].clone() if isinstance(x, Tensor) else x for x in given]


@pytest.fixture(scope="module")
def mass(interpreted: Any) -> Any:
    return interpreted("causal_mass")


@pytest.mark.parametrize("case", CASES, ids=str)
def test_equals_the_reference(mass: Any, case: Case) -> None:
    assert_mass(case, mass.causal_mass)


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_a_row_alone_is_bit_for_bit_what_it_is_in_a_batch(mass: Any, dtype: str) -> None:
    given = draw(Case(131, 40, dtype, past=7, batch=4))
    given[4][2], given[5][3] = False, False
    together = mass.causal_mass(*given)
    assert torch.equal(mass.causal_mass(*given), together)
    for b in range(4):
        assert torch.equal(mass.causal_mass(*alone(given, b)), together[b : b + 1])
    assert (together[:2] > 0).all() and (together[2:] == 0).all()


@pytest.mark.parametrize(
    "case", [Case(63, 32), Case(100, 32, "float16", 30, heads=1, scattered=True)]
)
def test_other_tiles_give_the_same(mass: Any, case: Case) -> None:
    given = draw(case)
    want = mass.causal_mass(*given)
    for other in ({"splits": 1}, {"splits": 16, "keys": 16}, {"own": 16}):
        got = mass._launch(*given, **other)
        torch.testing.assert_close(got, want, atol=EXACT, rtol=0)


def test_nothing_is_read_of_entries_that_do_not_attend(mass: Any) -> None:
    q, *rest = given = draw(Case(100, 32, "float16"))
    blind = given[4] & (given[5].cumsum(-1) > 0)
    q = q.masked_fill(~blind[:, None, :, None], float("nan"))
    assert torch.equal(mass.causal_mass(q, *rest), mass.causal_mass(*given))


@pytest.mark.parametrize("past", [0, 5])
def test_no_rows_or_nothing_to_fall_on_or_all_of_it_later(mass: Any, past: int) -> None:
    q, k, scale, mask, rows, onto, held = draw(Case(70, 32, "float16", past))
    none = torch.zeros_like(mask)
    for these, those in ((none, onto), (rows, none), (none, none), (onto, rows)):
        got = mass.causal_mass(q, k, scale, mask, these, those, held)
        assert torch.equal(got, torch.zeros(2))


def test_entries_before_all_of_the_others_count_as_nothing(mass: Any) -> None:
    q, k, scale, mask, rows, onto, held = draw(Case(70, 32, text=20))
    late = onto & (torch.arange(70) > 40)
    both = rows | (mask & (torch.arange(70) < 10))
    share = rows.sum(-1) / both.sum(-1)
    want = mass.causal_mass(q, k, scale, mask, rows, late, held) * share
    got = mass.causal_mass(q, k, scale, mask, both, late, held)
    torch.testing.assert_close(got, want, atol=EXACT, rtol=0)
    assert share[0] < 1


def test_all_masked_but_one(mass: Any) -> None:
    q, k, scale, *_ = draw(Case(70, 32, "float16", 6))
    one = torch.arange(70).expand(2, -1) == 69
    none = torch.zeros(2, 6, dtype=torch.bool)
    assert torch.equal(mass.causal_mass(q, k, scale, one, one, one, none), torch.ones(2))


def test_all_there_is_falls_on_all_there_is(mass: Any) -> None:
    q, k, scale, mask, rows, _, held = draw(Case(217, 32, "float16", 9))
    got = mass.causal_mass(q, k, scale, mask, rows, mask, torch.zeros_like(held))
    torch.testing.assert_close(got, torch.ones(2), atol=EXACT, rtol=0)


def test_equal_scores_make_even_shares(mass: Any) -> None:
    q, k, scale, mask, rows, onto, held = draw(Case(217, 32, "float16", 9))
    k = torch.ones_like(k) * 0.3
    seen = held.sum(-1, keepdim=True) + mask.cumsum(-1)
    shares = (onto.sum(-1, keepdim=True) / seen).masked_fill(~rows, 0).sum(-1) / rows.sum(-1)
    got = mass.causal_mass(q, k, scale, mask, rows, onto, held)
    torch.testing.assert_close(got, shares, atol=EXACT, rtol=0)


def test_without_held_all_of_the_cache_is_attended_to(mass: Any) -> None:
    q, k, *rest, held = draw(Case(63, 32, "float16", 20))
    k = k.nan_to_num()
    every = mass.causal_mass(q, k, *rest, torch.ones_like(held))
    assert torch.equal(mass.causal_mass(q, k, *rest), every)
    assert torch.equal(mass.causal_mass(q, k, *rest, None), every)
    assert (mass.causal_mass(q, k, *rest, held) > every).all()
    # no cache at all
    given = draw(Case(63, 32))
    assert torch.equal(mass.causal_mass(*given[:-1]), mass.causal_mass(*given))


@pytest.mark.parametrize("scale", [1, -0.5, 0.0, 50.0])
def test_any_scale(mass: Any, scale: float) -> None:
    q, k, _, *rest = draw(Case(63, 32, past=4))
    want = REFERENCE(q, k, scale, *rest)
    got = mass.causal_mass(q, k, scale, *rest)
    torch.testing.assert_close(got, want, atol=1e-4 if scale > 1 else EXACT, rtol=0)


def test_nan_shows_where_it_does_in_the_reference(mass: Any) -> None:
    q, k, scale, mask, rows, onto, held = draw(Case(70, 32, past=6, batch=4))
    k[1, 0, 70] = float("nan")  # a key that some see
    q[2, 0, 69] = float("nan")  # one that attends
    # one that attends and sees nothing
    mask[3], rows[3], onto[3], held[3] = False, True, True, False
    given = q, k, scale, mask, rows, onto, held
    want = REFERENCE(*given)
    assert want.isnan().tolist() == [False, True, True, True]
    assert torch.equal(mass.causal_mass(*given).isnan(), want.isnan())


def test_padding_that_attends_is_as_in_the_reference(mass: Any) -> None:
    q, k, scale, mask, rows, onto, held = draw(Case(70, 32))
    mask[:, 65] = False
    given = q, k, scale, mask, rows, onto, held
    assert (rows & ~mask).any()
    torch.testing.assert_close(mass.causal_mass(*given), REFERENCE(*given), atol=EXACT, rtol=0)


def test_views_without_copies_and_broadcast_heads(mass: Any) -> None:
    q, k, scale, *flags = draw(Case(40, 32, "float16", heads=3, past=5))
    shared = k[:, :1].expand(-1, 3, -1, -1)  # stride 0 over heads
    turned = torch.empty(2, 3, 32, 45, dtype=k.dtype).copy_(k.mT).mT  # stride 1 over entries
    spread = [torch.stack([x, ~x], -1)[..., 0] for x in flags]
    for keys in (shared, turned):
        want = mass.causal_mass(q, keys.contiguous(), scale, *flags)
        assert torch.equal(mass.causal_mass(q, keys, scale, *spread), want)


def test_what_no_kernel_is_made_for_is_named(mass: Any) -> None:
    given = draw(Case(9, 32, past=3))
    q, k = given[:2]
    assert mass.refusal(*given) is None
    assert mass.refusal(*given[:-1]) is None
    wide = torch.ones(2, 2, 9, 320)
    assert "head size of 320" in mass.refusal(wide, wide, *given[2:])
    assert "float64" in mass.refusal(q.double(), k.double(), *given[2:])
    assert "(2, 2, 0, 32)" in mass.refusal(q[:, :, :0], k, *given[2:])
    assert "(1, 2, 9, 32)" in mass.refusal(q[:1], k, *given[2:])
    assert "8 keys of 9 entries" in mass.refusal(q, k[:, :, :8], *given[2:])
    for i, name in enumerate(("mask", "rows", "onto", "held"), 3):
        for wrong in (given[i].long(), given[i][:, 1:], given[i].to("meta")):
            less = [*given[:i], wrong, *given[i + 1 :]]
            assert (name if wrong.device.type == "cpu" else "meta") in mass.refusal(*less)


def test_dispatch_runs_it_and_leaves_what_is_refused_to_torch(mass: Any) -> None:
    given, ran = draw(Case(9, 32, past=3)), dict[str, str]()
    with dispatch.using("triton", ran):
        got = ops.causal_mass(*given)
    assert ran == {"causal_mass": "triton"}
    torch.testing.assert_close(got, REFERENCE(*given), atol=EXACT, rtol=0)
    wide = torch.ones(2, 2, 9, 320)
    with dispatch.using("triton"), pytest.raises(Exception, match="head size of 320"):
        ops.causal_mass(wide, wide, *given[2:6])
    with dispatch.using("auto", ran):
        ops.causal_mass(*given)
    assert ran == {"causal_mass": "torch"}
