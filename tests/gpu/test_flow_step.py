"""On a CUDA device, FlowCut's kernels against the plain formula, and captured in a graph."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from tests.kernels.conftest import Poisoned
from vtc.dispatch import using
from vtc.scorers import flow

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
REFERENCE: Any = flow.flow_step.reference  # type: ignore[attr-defined]


def arguments(
    units: int,
    m: int = 1,
    remaining: int = 4,
    dtype: torch.dtype = torch.float32,
    heads: int = 16,
    size: int = 64,
    seed: int = 0,
) -> list[Any]:
    """Three rows of a block behind others; hidden patches hold what they like."""
    g = torch.Generator("cuda").manual_seed(1000 * seed + units)
    q, k, v = (
        torch.randn(3, 1 + units * m, heads, size, generator=g, device="cuda").transpose(1, 2)
        for _ in "qkv"
    )
    valid = torch.rand(3, units, generator=g, device="cuda") < 0.7
    valid[:, units // 2] = True
    hidden = ~valid.repeat_interleave(m, 1)
    for x in (k, v):
        x[:, :, 1:].masked_fill_(hidden[:, None, :, None], 1e4)
    before = torch.rand(3, units, generator=g, device="cuda").masked_fill(~valid, 0)
    shares = torch.tensor([0.2, 1.0, 0.5], device="cuda")
    targets = (valid.sum(-1) * shares).long().clamp_min(1)
    q, k, v = (x.to(dtype) for x in (q, k, v))
    return [q[:, :, :1], k, v, size**-0.5, valid, before, targets, remaining]


def ran(*args: Any) -> tuple[Tensor, Tensor]:
    told = dict[str, str]()
    with Poisoned(), using("triton", told):
        out = flow.flow_step(*args)
    assert told == {"flow_step": "triton"}
    return out


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("remaining", [0, 2, 20])
@pytest.mark.parametrize("units", [1, 63, 217, 431, 576, 1024])
def test_equals_the_formula(units: int, remaining: int, dtype: torch.dtype) -> None:
    args = arguments(units, remaining=remaining, dtype=dtype)
    with using("torch"):
        want, kept = REFERENCE(*args)
    score, keep = ran(*args)
    torch.testing.assert_close(score, want, atol=1e-5, rtol=1e-4)
    # an amount may round the other way, and near-ties change places
    assert ((keep.sum(-1) - kept.sum(-1)).abs() <= 1).all()
    low, high = want.masked_fill(~kept, 9e9).amin(1), want.masked_fill(kept | ~args[4], -1).amax(1)
    odd = keep != kept
    near = (want - low[:, None]).abs().minimum((want - high[:, None]).abs())
    assert ((near <= 1e-4 * want.abs().clamp_min(1)) | ~odd).all()


@pytest.mark.parametrize(("m", "heads", "size"), [(4, 16, 64), (4, 25, 128), (1, 16, 72)])
def test_heads_and_units_of_any_kind(m: int, heads: int, size: int) -> None:
    args = arguments(256, m, 4, torch.bfloat16, heads, size)
    with using("torch"):
        want, _ = REFERENCE(*args)
    torch.testing.assert_close(ran(*args)[0], want, atol=1e-5, rtol=1e-4)


def test_rows_of_an_image_drop_together() -> None:
    args = arguments(576, remaining=2)
    args[6] = args[6].new_tensor([10, 10, 10])
    image = torch.tensor([1, 0, 1], device="cuda")
    with using("torch"):
        _, kept = REFERENCE(*args, image)
    _, keep = ran(*args, image)
    assert ((keep.sum(-1) - kept.sum(-1)).abs() <= 1).all()
    dropped = (args[4] & ~keep).sum(-1)
    assert dropped[0] == dropped[2]


def test_captured_it_follows_its_inputs() -> None:
    args = arguments(576)
    ran(*args)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph), using("triton"):
        out = flow.flow_step(*args)
    for seed in (1, 2):
        other = arguments(576, seed=seed)
        for into, given in zip(args, other, strict=True):
            if isinstance(into, Tensor):
                into.copy_(given)
        graph.replay()
        for got, want in zip(out, ran(*other), strict=True):
            assert torch.equal(got, want)
