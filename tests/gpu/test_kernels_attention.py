"""On a CUDA device: the compiled attention kernels against the references."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor

from tests.kernels.conftest import Poisoned
from tests.kernels.test_attention import EXACT, Case, assert_received, assert_rows, draw, some_rows

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
LOW, FULL = "bfloat16", "float32"
ROWS = [
    *[Case(n, 64, LOW) for n in (1, 217, 2880)],
    *[Case(n, 64, LOW, batch=2, ragged=True) for n in (63, 431, 577, 16384)],
    *[Case(n, 64, FULL, batch=2, ragged=True) for n in (63, 577, 2880, 16384)],
    Case(577, 64, LOW, rows=40, batch=2, ragged=True),
    Case(577, 72, LOW, ragged=True, strided=True),
    Case(577, 256, LOW, ragged=True),
    Case(577, 64, FULL, keys=LOW, ragged=True),
]
RECEIVED = [
    *[Case(n, 64, LOW, batch=2, ragged=True) for n in (1, 63, 217, 431, 577, 2880)],
    *[Case(n, 64, FULL, ragged=True) for n in (63, 577, 2880, 16384)],
    Case(16384, 64, LOW, heads=5, ragged=True),
    Case(577, 72, LOW, ragged=True, strided=True),
    Case(577, 256, LOW),
]


@pytest.fixture(autouse=True)
def poisoned() -> Iterator[None]:
    with Poisoned():
        yield


def kernels() -> tuple[Callable[..., Tensor], Callable[..., Tensor]]:
    from vtc.kernels.attention_received import attention_received
    from vtc.kernels.attention_rows import attention_rows

    return attention_rows, attention_received


@pytest.mark.parametrize("case", ROWS, ids=str)
def test_rows_equal_the_reference(case: Case) -> None:
    assert_rows(case, kernels()[0], "cuda")


@pytest.mark.parametrize("case", RECEIVED, ids=str)
def test_received_equals_the_reference(case: Case) -> None:
    assert_received(case, kernels()[1], "cuda")


@pytest.mark.parametrize("dtype", [LOW, FULL])
def test_bits_are_the_same_again_and_alone(dtype: str) -> None:
    case = Case(577, 64, dtype, batch=3, ragged=True)
    q, k, valid = draw(case, "cuda")
    for kernel, x in zip(kernels(), (some_rows(q, valid, 1), q), strict=True):
        want = kernel(x, k, 0.125, valid)
        for _ in range(2):
            assert torch.equal(kernel(x, k, 0.125, valid), want)
        for b in range(case.batch):
            at = slice(b, b + 1)
            for y, keys in ((x[at], k[at]), (x[at].clone(), k[at].clone())):
                assert torch.equal(kernel(y, keys, 0.125, valid[at].clone()), want[at])


@pytest.mark.parametrize("dtype", [LOW, FULL])
def test_equal_keys_have_equal_weights_to_the_bit(dtype: str) -> None:
    q, k, valid = draw(Case(577, 64, dtype, batch=2, ragged=True), "cuda")
    k = k[:, :, 577 // 2, None].expand_as(k)
    for kernel, x in zip(kernels(), (some_rows(q, valid, 1), q), strict=True):
        got = kernel(x, k, 0.125, valid).view(2, -1)
        for row, there in zip(got, valid, strict=True):
            assert len(row[there].unique()) == 1
            assert (row.sum() - 1).abs() <= EXACT


def test_can_be_captured_and_replayed_on_other_numbers() -> None:
    q, k, valid = draw(Case(577, 64, LOW, batch=2), "cuda")
    other = draw(Case(577, 64, LOW, batch=2, ragged=True), "cuda")
    for kernel, at in zip(kernels(), (slice(1), slice(None)), strict=True):
        # of its own: a graph reads where it was captured
        given = q[:, :, at].clone(), k.clone(), valid.clone()
        kernel(given[0], given[1], 0.125, given[2])
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            got = kernel(given[0], given[1], 0.125, given[2])
        for x, new in zip(given, (other[0][:, :, at], *other[1:]), strict=True):
            x.copy_(new)
        graph.replay()
        want = kernel(given[0], given[1], 0.125, given[2])
        torch.testing.assert_close(got, want, atol=0, rtol=0, equal_nan=True)


def test_received_takes_less_than_a_hundredth_of_the_map() -> None:
    q, k, valid = draw(Case(16384, 64, LOW, heads=5), "cuda")
    received = kernels()[1]
    received(q, k, 0.125, valid)
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    received(q, k, 0.125, valid)
    peak = torch.cuda.max_memory_allocated() - before
    assert peak < 0.01 * 5 * 16384**2 * q.element_size()
