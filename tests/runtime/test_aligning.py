"""Feed-forward networks on widened copies of their weights: the same numbers, nothing left over."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from vtc.runtime.aligning import Aligned


class Gated(nn.Module):
    def __init__(self, width: int, bias: bool, act: Any) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(16, width, bias=bias)
        self.up_proj = nn.Linear(16, width, bias=bias)
        self.down_proj = nn.Linear(width, 16, bias=bias)
        self.act = act

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.down_proj(self.act(self.gate_proj(x)) * self.up_proj(x))
        return out


@pytest.mark.parametrize(
    "act", [nn.SiLU(), nn.GELU(), nn.Sigmoid()], ids=lambda a: type(a).__name__
)
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("width", [90, 91, 92, 96])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_zeros_change_nothing(width: int, bias: bool, act: nn.Module, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    module = nn.Sequential(Gated(width, bias, act)).to(dtype)
    x = torch.randn(5, 16, dtype=dtype)
    before = {name: p.data_ptr() for name, p in module.named_parameters()}
    want, aligned, seen = module(x), Aligned(), []
    hook = module[0].down_proj.register_forward_pre_hook(lambda m, a: seen.append(a[0].shape[-1]))
    for _ in range(2):
        with aligned.within((module,)):
            got = module(x)
    hook.remove()
    step = 16 // x.element_size()
    assert seen == [-(-width // step) * step] * 2
    torch.testing.assert_close(got, want, atol=1e-6 if dtype is torch.float32 else 1e-2, rtol=1e-5)
    assert {name: p.data_ptr() for name, p in module.named_parameters()} == before


def test_other_networks_are_left_alone() -> None:
    plain = nn.Sequential(nn.Linear(16, 90), nn.GELU(), nn.Linear(90, 16))
    before = [p.data_ptr() for p in plain.parameters()]
    with Aligned().within((plain,)):
        assert [p.data_ptr() for p in plain.parameters()] == before


def test_copies_of_weights_that_were_written_to_are_stale() -> None:
    module = nn.Sequential(Gated(90, True, nn.SiLU()))
    aligned = Aligned()
    with aligned.within((module,)):
        pass
    assert not aligned.stale and aligned.held_bytes > 0
    with torch.no_grad():
        module[0].up_proj.weight.mul_(-2)
    assert aligned.stale
    aligned.clear()
    assert not aligned.stale and aligned.held_bytes == 0
