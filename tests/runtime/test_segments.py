"""Attention within segments, all at once: what walking over them gives."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from vtc.runtime.segments import by_segment

CASES = {
    "one": [7],
    "equal": [4, 4, 4],
    "nearly equal": [4, 4, 3, 4, 2],
    "far from equal": [40, 1, 2, 1],
    "single entries": [1, 1, 1],
}


def attend(
    module: nn.Module, q: Any, k: Any, v: Any, mask: Any, scaling: float, **more: Any
) -> tuple[torch.Tensor, None]:
    assert not any(name.startswith(("cu_seq", "max_length")) for name in more)
    out = nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scaling)
    return out.transpose(1, 2), None


@pytest.mark.parametrize("hidden", [False, True], ids=["", "some hidden"])
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_equals_walking_over_segments(case: str, dtype: torch.dtype, hidden: bool) -> None:
    torch.manual_seed(0)
    lengths = CASES[case]
    borders = torch.tensor([0, *lengths]).cumsum(0)
    q, k, v = torch.randn(3, 1, 2, sum(lengths), 16, dtype=dtype).unbind(0)
    bias = None
    if hidden:
        bias = torch.zeros(1, 1, 1, sum(lengths), dtype=dtype)
        bias[torch.rand(bias.shape) < 0.5] = torch.finfo(dtype).min
    got, _ = by_segment(
        attend, nn.Identity(), q, k, v, bias, cu_seq_lens_q=borders, scaling=0.3, max_length_q=9
    )
    pieces = zip(*(x.split(lengths, 2) for x in (q, k, v)), strict=True)
    own = [None] * len(lengths) if bias is None else bias.split(lengths, 3)
    found = zip(pieces, own, strict=True)
    want = torch.cat([attend(nn.Identity(), *p, b, 0.3)[0] for p, b in found], 1)
    assert got.shape == want.shape
    torch.testing.assert_close(got, want, atol=1e-6 if dtype is torch.float32 else 2e-2, rtol=0)
