"""Progress on stderr: a bar for people, lines with elapsed seconds for files."""

from __future__ import annotations

import sys
import time

from tqdm import tqdm


class Progress:
    """How far a run is. A context manager.

    Args:
        what: its name.
        total: steps.
    """

    def __init__(self, what: str, total: int) -> None:
        self._what, self._total, self._done = what, total, 0
        self._start = time.perf_counter()
        # a bar is redrawn in place, which only a terminal can show
        self._bar = tqdm(total=total, desc=what, file=sys.stderr, disable=not sys.stderr.isatty())

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.close()

    @property
    def seconds(self) -> float:
        """Since it began."""
        return time.perf_counter() - self._start

    def step(self, text: str) -> None:
        """One more is done."""
        self._done += 1
        self._bar.update(1)
        self.say(f"{self._done}/{self._total}  {text}")

    def say(self, text: str) -> None:
        """Something worth a line."""
        self._bar.write(f"{self.seconds:6.1f} s  {self._what}  {text}", file=sys.stderr)
        sys.stderr.flush()
