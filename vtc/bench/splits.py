"""Where the time of a call goes, by events on the device that nobody waits for within the call."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from torch import nn

from vtc import ops
from vtc.adapters.registry import adapter_of
from vtc.bench.timing import wait
from vtc.runtime.clock import Clock

Call = Callable[[], Any]

# what the operations are for
_STEPS = {
    "score_ms": ("attention_rows", "attention_received", "causal_mass"),
    "select_ms": ("group_topk", "greedy_diverse", "greedy_map"),
    "gather_ms": ("compact", "packed_index", "group_merge"),
}


@contextmanager
def encoder_and_selection(
    model: Any, handle: Any
) -> Iterator[Callable[[], tuple[float | None, float | None]]]:
    """Within it, a function that gives both times of the last call: what a patched model reports;
    of the stock model what came before its language model."""
    if handle is not None:

        def reported() -> tuple[float | None, float | None]:
            report = handle.report()
            return report.encoder_ms, report.selector_ms

        yield reported
        return

    clock = Clock(model.device)
    hooks = [
        model.register_forward_pre_hook(lambda module, args: clock.mark("start")),
        adapter_of(model).language_model.register_forward_pre_hook(
            lambda module, args: clock.mark("encoded")
        ),
    ]
    try:
        yield lambda: (clock.ms("start", "encoded"), None)
    finally:
        for hook in hooks:
            hook.remove()


def of_operations(model: Any, call: Call, runs: int) -> dict[str, float]:
    """Scores, choice and gather of a patched model that runs eagerly: sums over the operations of a
    call, medians over calls."""
    totals: dict[str, list[float]] = {step: [] for step in _STEPS}
    for _ in range(runs):
        clock = Clock(model.device)
        with _marking(clock) as counts:
            call()
        for step, names in _STEPS.items():
            spans = [(f"{n} {i}", f"{n} {i} end") for n in names for i in range(counts.get(n, 0))]
            totals[step].append(sum(clock.ms(*span) or 0.0 for span in spans))
    return {step: statistics.median(times) for step, times in totals.items()}


@contextmanager
def _marking(clock: Clock) -> Iterator[dict[str, int]]:
    """Within it the clock notes where each operation starts and ends; gives how often each ran."""
    counts: dict[str, int] = {}
    depth = 0

    def marked(name: str, operation: Callable[..., Any]) -> Callable[..., Any]:
        def run(*args: Any, **kwargs: Any) -> Any:
            nonlocal depth
            # one of them may be made of others
            if depth:
                return operation(*args, **kwargs)
            number = counts.setdefault(name, 0)
            counts[name] += 1
            depth += 1
            clock.mark(f"{name} {number}")
            try:
                return operation(*args, **kwargs)
            finally:
                clock.mark(f"{name} {number} end")
                depth -= 1

        return run

    names = [name for step in _STEPS.values() for name in step]
    before = {name: getattr(ops, name) for name in names}
    try:
        for name, operation in before.items():
            setattr(ops, name, marked(name, operation))
        yield counts
    finally:
        for name, operation in before.items():
            setattr(ops, name, operation)


def of_blocks(model: Any, call: Call, runs: int) -> list[float] | None:
    """Milliseconds of each encoder block, with what is decided behind it, of a model that runs
    eagerly; None where blocks were not run one by one."""
    blocks: Sequence[nn.Module] = adapter_of(model).encoder().blocks
    clock = Clock(model.device)

    def entering(number: int) -> Callable[[nn.Module, Any], None]:
        return lambda module, args: clock.mark(f"block {number}")

    def left(module: nn.Module, args: Any, output: Any) -> None:
        clock.mark(f"block {len(blocks)}")

    found: list[list[float]] = []
    hooks = [b.register_forward_pre_hook(entering(i)) for i, b in enumerate(blocks)]
    hooks.append(blocks[-1].register_forward_hook(left))
    try:
        for _ in range(runs):
            wait(model.device)
            call()
            times = [clock.ms(f"block {i}", f"block {i + 1}") for i in range(len(blocks))]
            found.append([t for t in times if t is not None])
    finally:
        for hook in hooks:
            hook.remove()
    if any(len(times) != len(blocks) for times in found):
        return None
    return [statistics.median(times) for times in zip(*found, strict=True)]
