"""On a CUDA device: `causal_mass` compiled, against the reference, and captured in a graph."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor

from tests.kernels.conftest import Poisoned
from tests.kernels.test_causal_mass import REFERENCE, Case, alone, assert_mass, draw

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
LOW, FULL = "bfloat16", "float32"
CASES = [
    *[Case(n, 128, LOW, heads=4) for n in (1, 63, 217, 431, 577, 2880)],
    *[Case(n, 128, FULL, heads=4) for n in (1, 63, 577, 2880)],
    *[Case(n, 64, LOW, past=past, text=200) for n, past in ((577, 300), (2880, 70), (16000, 384))],
    *[Case(577, d, LOW, past=33, text=70) for d in (32, 80, 256)],
    Case(431, 256, "float16", scattered=True),
    Case(2880, 128, LOW, scattered=True),
    Case(16384, 64, FULL, text=70),
    Case(577, 72, LOW, past=9, strided=True),
    Case(577, 64, FULL, keys=LOW),
]


@pytest.fixture(autouse=True)
def poisoned() -> Iterator[None]:
    with Poisoned():
        yield


def kernel() -> Callable[..., Tensor]:
    from vtc.kernels.causal_mass import causal_mass

    return causal_mass


@pytest.mark.parametrize("case", CASES, ids=str)
def test_equals_the_reference(case: Case) -> None:
    assert_mass(case, kernel(), "cuda")


@pytest.mark.parametrize("dtype", [LOW, FULL])
def test_bits_are_the_same_again_and_alone(dtype: str) -> None:
    given = draw(Case(577, 128, dtype, past=40, batch=5, heads=32, text=64), "cuda")
    given[4][3], given[5][4] = False, False
    want = kernel()(*given)
    assert (want[:3] > 0).all() and (want[3:] == 0).all()
    for _ in range(3):
        assert torch.equal(kernel()(*given), want)
    for b in range(5):
        assert torch.equal(kernel()(*alone(given, b)), want[b : b + 1])


def test_can_be_captured_and_replayed_on_other_numbers() -> None:
    shape = {"n": 577, "d": 128, "dtype": LOW, "past": 12, "heads": 8}
    given = draw(Case(**shape), "cuda")
    kernel()(*given)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        got = kernel()(*given)
    for text, scattered in ((130, False), (9, True), (1, False)):
        other = draw(Case(**shape, text=text, scattered=scattered), "cuda")
        for into, new in zip(given, other, strict=True):
            if isinstance(into, Tensor):
                into.copy_(new)
        graph.replay()
        assert torch.equal(got, kernel()(*other))
        torch.testing.assert_close(got, REFERENCE(*other), atol=1e-4, rtol=1e-4)
