"""Times and their statistics: whole calls waited for, and work queued on the device."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any

import torch

Call = Callable[[], Any]

# at least what a sum over all of an H100's L2 (50 MB) needs to push everything else out
_FLUSH = 256 * 2**20


def quantiles(times: Sequence[float]) -> tuple[float, float, float]:
    """Median, 20th and 80th percentile."""
    at = torch.tensor([0.2, 0.5, 0.8], dtype=torch.float64)
    low, median, high = torch.tensor(times, dtype=torch.float64).quantile(at).tolist()
    return median, low, high


def named(name: str, times: Sequence[float]) -> dict[str, float]:
    """Median, `_p20` and `_p80` under a name."""
    return dict(zip((name, f"{name}_p20", f"{name}_p80"), quantiles(times), strict=True))


def wait(device: torch.device) -> None:
    """Until the device has done all that it was told."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def whole_ms(call: Call, device: torch.device) -> float:
    """From a call to the moment when all of its work is done, launches included."""
    wait(device)
    start = time.perf_counter()
    call()
    wait(device)
    return (time.perf_counter() - start) * 1e3


def device_ms(
    call: Call, device: torch.device, budget_ms: float = 80.0, least: int = 5, most: int = 100
) -> list[float]:
    """Milliseconds of a call on the device, again and again, with a cold cache.

    On CUDA between two events, behind a memset that empties the L2 and gives the host time to queue
    the call: launches are hidden as long as they take less than that, as in Triton's `do_bench`.

    Args:
        call: what is timed; it has run before.
        device: where it runs.
        budget_ms: about how long all of it may take.
        least: repetitions at the least.
        most: and at the most.
    """
    once = whole_ms(call, device)
    runs = int(min(max(budget_ms / max(once, 1e-3), least), most))
    if device.type != "cuda":
        return [whole_ms(call, device) for _ in range(runs)]
    cold = torch.empty(_FLUSH, dtype=torch.int8, device=device)
    events = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(runs)]
    for start, end in events:
        cold.zero_()
        start.record()
        call()
        end.record()
    wait(device)
    return [float(start.elapsed_time(end)) for start, end in events]


def graph_ms(call: Call, device: torch.device) -> list[float] | None:
    """The same for the call as one CUDA graph; None where it cannot be one."""
    if device.type != "cuda":
        return None
    graph = torch.cuda.CUDAGraph()
    try:
        with torch.cuda.graph(graph):
            call()
    except RuntimeError:
        return None
    graph.replay()
    return device_ms(graph.replay, device)
