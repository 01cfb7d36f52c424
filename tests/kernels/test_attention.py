"""`attention_rows` and `attention_received`: the interpreted kernels against the references."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from vtc import dispatch, ops

pytestmark = pytest.mark.filterwarnings("ignore:All-NaN slice encountered:RuntimeWarning")

# what float32 itself leaves open, as a share of the largest weight
EXACT = 2e-6


class Case(NamedTuple):
    n: int
    d: int
    dtype: str = "float32"
    rows: int = 1
    batch: int = 1
    heads: int = 2
    ragged: bool = False
    keys: str = ""  # their dtype, where it is another one
    strided: bool = False
    # tiles that are quicker to interpret
    tiles: tuple[tuple[str, int], ...] = ()

    def __str__(self) -> str:
        more = [f"R{self.rows}", self.dtype, self.keys, "ragged" * self.ragged, "slice"]
        shape = f"B{self.batch}-H{self.heads}-N{self.n}-d{self.d}"
        return "-".join([shape, *filter(None, more[: 5 if self.strided else 4])])


WIDE = (("own", 256), ("other", 256))
ROWS = [
    Case(1, 32),
    Case(63, 72, "bfloat16", rows=3, batch=2, ragged=True),
    Case(63, 96, "float16", rows=70, heads=1),
    Case(217, 64, "float32", keys="bfloat16", ragged=True),
    Case(217, 80, "float16", rows=17, heads=3, strided=True),
    Case(431, 128, "float32", rows=2, heads=1, ragged=True),
    Case(431, 256, "float16", heads=1),
    Case(577, 64, "float16", batch=2, heads=3, ragged=True),
    Case(577, 64, "bfloat16", strided=True),
    Case(2880, 64, "float16", heads=1, ragged=True),
]
RECEIVED = [
    Case(1, 64, "float16"),
    Case(63, 32, ragged=True),
    Case(63, 72, "bfloat16", batch=2, ragged=True),
    Case(217, 80, "float16", heads=3, strided=True, ragged=True),
    Case(217, 64, keys="bfloat16", heads=1, tiles=(("step", 64), *WIDE)),
    Case(431, 256, "float16", heads=1, tiles=WIDE),
    Case(431, 96, "bfloat16", ragged=True, tiles=(("step", 32), *WIDE)),
    Case(577, 64, "float16", batch=2, ragged=True, tiles=(("own", 128), ("other", 128))),
    Case(577, 128, "float32", heads=1, strided=True, tiles=(("step", 64), *WIDE)),
]


def draw(case: Case, device: str = "cpu") -> tuple[Tensor, Tensor, Tensor]:
    """Queries, keys and what is valid; slots that are not valid hold NaN."""
    g = torch.Generator().manual_seed(case.n + case.d)
    shape = (case.batch, case.n, 3, case.heads, case.d)
    if case.strided:  # every other slice of a fused projection, heads after entries
        fused = torch.randn(*shape[:-2], case.d, 2 * case.heads, generator=g)[..., ::2].mT
    else:
        fused = torch.randn(shape, generator=g)
    valid = torch.ones(case.batch, case.n, dtype=torch.bool)
    if case.ragged:
        valid = torch.rand(valid.shape, generator=g) < 0.7
        valid[:, case.n // 2] = True
    fused = fused.masked_fill(~valid[:, :, None, None, None], float("nan")).to(device)
    q, k = (fused[:, :, i].transpose(1, 2) for i in range(2))
    q, k = q.to(getattr(torch, case.dtype)), k.to(getattr(torch, case.keys or case.dtype))
    return q, k, valid.to(device)


def some_rows(q: Tensor, valid: Tensor, rows: int) -> Tensor:
    """Queries where they are valid in all rows of the batch, repeated if there are too few."""
    at = valid.all(0).nonzero()[:, 0]
    if not len(at):
        at = valid.new_zeros(1).long()
        q = q.nan_to_num()
    return q[:, :, at.repeat(rows)[:rows]]


def plain_map(q: Tensor, k: Tensor, scale: float, valid: Tensor) -> Tensor:
    """Full attention as eager code has it, in the precision given: `[B, H, R, N]`."""
    logits = (q @ k.mT * scale).masked_fill(~valid[:, None, None], float("-inf"))
    return logits.softmax(-1)


def allowed(plain: Tensor, truth: Tensor) -> float:
    """flash-attention's rule: at most twice the error of plain torch in low precision."""
    error = (plain.float() - truth).abs().max()
    return (2 * error + EXACT * truth.abs().max()).item()


def assert_sums_to_one(got: Tensor, plain: Tensor) -> None:
    one = torch.ones(got.shape[:-1], device=got.device)
    assert (got.sum(-1) - one).abs().max() <= allowed(plain.float().sum(-1), one)


def assert_rows(case: Case, kernel: Callable[..., Tensor], device: str = "cpu") -> None:
    (q, k, valid), scale = draw(case, device), case.d**-0.5
    q = some_rows(q, valid, case.rows)
    got = kernel(q, k, scale, valid)
    truth = ops.attention_rows.reference(q, k, scale, valid)
    same = q if q.dtype == k.dtype else q.float(), k if q.dtype == k.dtype else k.float()
    plain = plain_map(*same, scale, valid).mean(1)
    assert got.dtype == torch.float32
    assert got.shape == truth.shape
    assert (got - truth).abs().max() <= allowed(plain, truth)
    assert (got.masked_fill(valid[:, None], 0) == 0).all()
    assert_sums_to_one(got, plain)
    if not case.ragged:
        assert torch.equal(kernel(q, k, scale), got)


def assert_received(case: Case, kernel: Callable[..., Tensor], device: str = "cpu") -> None:
    (q, k, valid), scale = draw(case, device), case.d**-0.5
    got = kernel(q, k, scale, valid, **dict(case.tiles))
    truth = ops.attention_received.reference(q, k, scale, valid)
    same = q if q.dtype == k.dtype else q.float(), k if q.dtype == k.dtype else k.float()
    weights = plain_map(*same, scale, valid).masked_fill(~valid[:, None, :, None], 0)
    plain = (weights.sum(2) / valid.sum(-1)[:, None, None]).mean(1)
    assert got.dtype == torch.float32
    assert got.shape == truth.shape
    assert (got - truth).abs().max() <= allowed(plain, truth)
    assert (got[~valid] == 0).all()
    assert_sums_to_one(got, plain)


@pytest.fixture(scope="module")
def rows(interpreted: Any) -> Any:
    return interpreted("attention_rows")


@pytest.fixture(scope="module")
def received(interpreted: Any) -> Any:
    return interpreted("attention_received")


@pytest.mark.parametrize("case", ROWS, ids=str)
def test_rows_equal_the_reference(rows: Any, case: Case) -> None:
    assert_rows(case, rows.attention_rows)


@pytest.mark.parametrize("case", RECEIVED, ids=str)
def test_received_equals_the_reference(received: Any, case: Case) -> None:
    assert_received(case, received._launch)


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_a_row_alone_is_bit_for_bit_what_it_is_in_a_batch(
    rows: Any, received: Any, dtype: str
) -> None:
    case = Case(65, 40, dtype, rows=2, batch=3, ragged=True)
    (q, k, valid), few = draw(case), some_rows(*draw(case)[::2], case.rows)
    together = (
        rows.attention_rows(few, k, 0.2, valid),
        received.attention_received(q, k, 0.2, valid),
    )
    for b in range(case.batch):
        at = slice(b, b + 1)
        args = k[at], 0.2, valid[at]
        assert torch.equal(rows.attention_rows(few[at].clone(), *args), together[0][at])
        assert torch.equal(received.attention_received(q[at].clone(), *args), together[1][at])


def test_rows_are_the_same_in_several_passes(rows: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    case = Case(63, 32, "float16", rows=40)
    q, k, valid = draw(case)
    q = some_rows(q, valid, case.rows)
    want = rows._launch(q, k, 0.2, None, rows=16)
    for most in (1, 33 * case.heads * 128):
        monkeypatch.setattr(rows, "_MAP", most)
        assert torch.equal(rows._launch(q, k, 0.2, None, rows=16), want)


@pytest.mark.parametrize("scale", [1, -0.5, 0.0])
def test_any_scale(rows: Any, received: Any, scale: float) -> None:
    q, k, valid = draw(Case(17, 32, ragged=True))
    few = some_rows(q, valid, 2)
    for op, got in (
        (ops.attention_rows, rows.attention_rows(few, k, scale, valid)),
        (ops.attention_received, received.attention_received(q, k, scale, valid)),
    ):
        want = op.reference(few if op is ops.attention_rows else q, k, scale, valid)
        torch.testing.assert_close(got, want, atol=EXACT, rtol=0)


def test_only_one_is_valid(rows: Any, received: Any) -> None:
    q, k, _ = draw(Case(70, 32, "float16", batch=2))
    valid = torch.zeros(2, 70, dtype=torch.bool)
    valid[0, 69] = valid[1, 0] = True
    assert torch.equal(received.attention_received(q, k, 0.2, valid), valid.float())
    want = valid.float()[:, None].expand(-1, 3, -1)
    assert torch.equal(rows.attention_rows(q[:, :, :3], k, 0.2, valid), want)


def test_nothing_is_valid(rows: Any, received: Any) -> None:
    q, k, valid = draw(Case(70, 32, batch=2))
    valid[1] = False
    few = q[:, :, :2]
    for op, kernel, x in (
        (ops.attention_rows, rows.attention_rows, few),
        (ops.attention_received, received.attention_received, q),
    ):
        got, want = kernel(x, k, 0.2, valid), op.reference(x, k, 0.2, valid)
        torch.testing.assert_close(got, want, atol=EXACT, rtol=0, equal_nan=True)


@pytest.mark.parametrize("n", [63, 217])
def test_equal_scores_make_even_weights(rows: Any, received: Any, n: int) -> None:
    q, k, valid = draw(Case(n, 32, "float16", ragged=True))
    q, k = q.nan_to_num(), torch.ones_like(k) * 0.3
    even = valid / valid.sum(-1, keepdim=True)
    for got in (
        rows.attention_rows(q[:, :, :1], k, 0.2, valid)[:, 0],
        received.attention_received(q, k, 0.2, valid),
    ):
        assert (got - even).abs().max() <= EXACT * even.max()


def test_large_logits_do_not_overflow(rows: Any, received: Any) -> None:
    q, k, valid = draw(Case(63, 32))
    want = ops.attention_rows.reference(q[:, :, :2], k, 50.0)
    torch.testing.assert_close(rows.attention_rows(q[:, :, :2], k, 50.0), want, atol=1e-4, rtol=0)
    got = received.attention_received(q, k, 50.0, valid)
    want = ops.attention_received.reference(q, k, 50.0, valid)
    torch.testing.assert_close(got, want, atol=1e-4, rtol=0)


def test_nan_where_valid_shows_as_in_the_reference(rows: Any, received: Any) -> None:
    q, k, valid = draw(Case(70, 32, batch=2))
    k[1, 0, 66] = float("nan")
    got = rows.attention_rows(q[:, :, :2], k, 0.2, valid).isnan()
    assert torch.equal(got, ops.attention_rows.reference(q[:, :, :2], k, 0.2, valid).isnan())
    for x in (q, q.index_fill(2, torch.tensor([3]), float("nan"))):
        got = received.attention_received(x, k, 0.2, valid).isnan()
        assert torch.equal(got, ops.attention_received.reference(x, k, 0.2, valid).isnan())


def test_views_without_copies_and_broadcast_heads(rows: Any, received: Any) -> None:
    q, k, valid = draw(Case(40, 32, "float16", heads=3))
    shared = k[:, :1].expand(-1, 3, -1, -1)  # stride 0 over heads
    turned = torch.empty(1, 3, 32, 40, dtype=k.dtype).copy_(k.mT).mT  # stride 1 over entries
    every = torch.stack([valid, ~valid], -1)[..., 0]
    for keys in (shared, turned):
        want = rows.attention_rows(q[:, :, :2], keys.contiguous(), 0.2, valid)
        assert torch.equal(rows.attention_rows(q[:, :, :2], keys, 0.2, every), want)
        want = received.attention_received(q, keys.contiguous(), 0.2, valid)
        assert torch.equal(received.attention_received(q, keys, 0.2, every), want)


def test_what_no_kernel_is_made_for_is_named(rows: Any, received: Any) -> None:
    q, k, valid = draw(Case(9, 32, batch=2))
    wide = torch.ones(2, 2, 9, 320)
    for module in (rows, received):
        assert module.refusal(q, k, 1.0, valid) is None
        assert "head size of 320" in module.refusal(wide, wide, 1.0, valid)
        assert "float64" in module.refusal(q.double(), k.double(), 1.0, valid)
        assert "(2, 2, 0, 32)" in module.refusal(q, k[:, :, :0], 1.0, valid[:, :0])
        assert "(1, 2, 9, 32)" in module.refusal(q[:1], k, 1.0, valid)
        assert "int64" in module.refusal(q, k, 1.0, valid.long())
        assert "(2, 8)" in module.refusal(q, k, 1.0, valid[:, 1:])
        assert "meta" in module.refusal(q, k.to("meta"), 1.0, valid)
    assert rows.refusal(q[:, :, :3], k, 1.0) is None
    assert "(2, 2, 3, 32)" in received.refusal(q[:, :, :3], k, 1.0, valid)


def test_dispatch_runs_them_and_leaves_what_is_refused_to_torch() -> None:
    q, k, valid = draw(Case(9, 32, batch=2))
    ran: dict[str, str] = {}
    with dispatch.using("triton", ran):
        got = ops.attention_rows(q[:, :, :1], k, 0.2), ops.attention_received(q, k, 0.2, valid)
    assert ran == {"attention_rows": "triton", "attention_received": "triton"}
    assert (got[0] - ops.attention_rows.reference(q[:, :, :1], k, 0.2)).abs().max() <= EXACT
    assert (got[1] - ops.attention_received.reference(q, k, 0.2, valid)).abs().max() <= EXACT
    with dispatch.using("triton"), pytest.raises(Exception, match="head size of 320"):
        ops.attention_rows(torch.ones(1, 1, 1, 320), torch.ones(1, 1, 4, 320), 1.0)


def test_memory_that_is_not_written_shows() -> None:
    for x in (
        torch.empty(3),
        torch.empty_like(torch.ones(2, dtype=torch.bfloat16)),
        torch.ones(1).new_empty(4),
        torch.empty_strided((2,), (1,)),
    ):
        assert x.isnan().all()
    assert (torch.empty(3, dtype=torch.int64) < -(2**62)).all()
