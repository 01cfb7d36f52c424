"""Times on the device that does the work, without waiting for it."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Literal

import torch

# between which blocks or layers a method decides while they run
Place = Literal["encoder", "llm"]


class Clock:
    """Named moments of one call; on CUDA they are events, read only when asked for.

    Args:
        device: where the model is.
        captured: whether its moments may be part of a captured call: then each replay sets them
            anew.
    """

    def __init__(self, device: torch.device, captured: bool = False) -> None:
        self.device, self._captured = device, captured
        self._moments: dict[str, torch.cuda.Event | float] = {}
        self._spans: list[tuple[Place, str, str]] = []

    def mark(self, name: str) -> None:
        """Remember now as `name`."""
        if self.device.type != "cuda":
            self._moments[name] = time.perf_counter()
            return
        event = torch.cuda.Event(enable_timing=True, external=self._captured)
        event.record(torch.cuda.current_stream(self.device))
        self._moments[name] = event

    @contextmanager
    def span(self, place: Place) -> Iterator[None]:
        """Within it is time that `spanned` adds up."""
        names = f"span {len(self._spans)}", f"end of span {len(self._spans)}"
        self.mark(names[0])
        try:
            yield
        finally:
            self.mark(names[1])
            self._spans.append((place, *names))

    @property
    def spans(self) -> int:
        """How many there were."""
        return len(self._spans)

    def adopt(self, other: Clock) -> None:
        """Count the spans of another clock too."""
        for place, *names in other._spans:
            own = [f"{name} of {id(other)}" for name in names]
            for name, theirs in zip(own, names, strict=True):
                self._moments[name] = other._moments[theirs]
            self._spans.append((place, own[0], own[1]))

    def spanned(self, place: Place) -> float:
        """Milliseconds in the spans of a place."""
        return sum(self.ms(*names) or 0.0 for at, *names in self._spans if at == place)

    def ms(self, start: str, end: str) -> float | None:
        """Milliseconds from one moment to another; None if either was never reached."""
        a, b = self._moments.get(start), self._moments.get(end)
        if isinstance(a, torch.cuda.Event) and isinstance(b, torch.cuda.Event):
            b.synchronize()
            return float(a.elapsed_time(b))
        if isinstance(a, float) and isinstance(b, float):
            return (b - a) * 1e3
        return None
