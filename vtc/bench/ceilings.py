"""What the machine can do at most: one copy and one matrix product, measured in the same run."""

from __future__ import annotations

import statistics
from dataclasses import asdict, dataclass
from typing import Any

import torch

from vtc.bench.timing import device_ms

# bytes of the copy (read and written once each), side of the square matrices
_LARGE = 2**30, 8192
_TINY = 2**22, 128


@dataclass(frozen=True)
class Ceilings:
    """Attributes:
    copy: bytes per second, read and written.
    matmul: FLOPs per second of a bfloat16 product.
    """

    copy: float
    matmul: float

    def floor_ms(self, work: Work) -> float:
        """The least time for this much: that of the scarcer of the two."""
        return 1e3 * max(work.bytes / self.copy, work.flops / self.matmul)

    def __str__(self) -> str:
        return f"copies {self.copy / 1e9:,.0f} GB/s, products {self.matmul / 1e12:,.1f} TFLOP/s"

    def to_dict(self) -> dict[str, Any]:
        """For a row."""
        return {f"ceiling_{name}": value for name, value in asdict(self).items()}


@dataclass(frozen=True)
class Work:
    """Bytes that must be moved and FLOPs that must be done; adds up."""

    bytes: float = 0.0
    flops: float = 0.0

    def __add__(self, other: Work) -> Work:
        return Work(self.bytes + other.bytes, self.flops + other.flops)

    def __mul__(self, times: float) -> Work:
        return Work(self.bytes * times, self.flops * times)


def measured(device: torch.device, tiny: bool = False) -> Ceilings:
    """Of a device; `tiny`: small sizes, to try the code."""
    size, side = _TINY if tiny else _LARGE
    source = torch.zeros(size // 2, dtype=torch.bfloat16, device=device)
    target = torch.empty_like(source)
    copy = device_ms(lambda: target.copy_(source), device)
    # zeros and constants draw less power than numbers do, and run faster
    a, b = (torch.randn(side, side, device=device).bfloat16() for _ in range(2))
    product = device_ms(lambda: a @ b, device)
    return Ceilings(
        copy=2 * size / statistics.median(copy) * 1e3,
        matmul=2 * side**3 / statistics.median(product) * 1e3,
    )
