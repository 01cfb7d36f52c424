"""From pixel values on the device to the first logits, at 7B: stock and compressed, eager and fast.

Every provider of a case runs in the same process on the same model. What is fast must have been
equal to the eager path before; see `gate`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch

from vtc.bench.ceilings import Ceilings
from vtc.bench.ceilings import measured as measured_ceilings
from vtc.bench.floor import decode, encoder, gather, prefill
from vtc.bench.gate import Gate
from vtc.bench.measure import Effort, attempt, emptied, measured
from vtc.bench.plan import Case, Settings, planned
from vtc.bench.progress import Progress
from vtc.bench.providers import FLASH, ROUTES, SDPA, STOCK, Provider, flash_missing
from vtc.bench.rows import Row, Store
from vtc.bench.shapes import Shape, build, sharpen

_DRIFT_RUNS = 5
_OF_STOCK = ("ttft_ms", "generate_1_ms", "generate_ms", "tpot_ms", "encoder_ms")


def run(settings: Settings, store: Store) -> bool:
    """Check and measure, main targets first; False if something was red or went wrong."""
    plan = planned(settings)
    total = sum(len(case.providers) for _, cases in plan for case in cases)
    green = True
    with Progress("ttft", total) as progress:
        ceilings = measured_ceilings(torch.device(settings.device), settings.tiny)
        progress.say(str(ceilings))
        sittings = _Run(settings, store, progress, ceilings)
        for shape, cases in plan:
            emptied(torch.device(settings.device))  # models before this one
            green &= _Sitting(shape, sittings).run(cases)
    return green


@dataclass
class _Run:
    """What the sittings of a process share.

    Attributes:
        settings: of the run.
        store: of rows.
        progress: is told.
        ceilings: of the device.
        stock: by model, batch and path, what speed-ups are against.
    """

    settings: Settings
    store: Store
    progress: Progress
    ceilings: Ceilings
    stock: dict[tuple[str, int, str], Row] = field(default_factory=dict)


class _Sitting:
    """One model, built once.

    Args:
        shape: the model.
        run: it is a part of.
    """

    def __init__(self, shape: Shape, run: _Run) -> None:
        self.shape, self._run = shape, run
        self.settings, self.progress = run.settings, run.progress
        self.device = torch.device(run.settings.device)

    def run(self, cases: Sequence[Case]) -> bool:
        """False if something was red or went wrong."""
        red = self._red(cases)
        model = build(self.shape, self.settings.device, torch.bfloat16)
        sharpen(model)
        self.progress.say(f"{self.shape.name}: built")
        for case in cases:
            red |= self._measure(model, case)
        return not red

    def _red(self, cases: Sequence[Case]) -> bool:
        """Check every fast provider; remembers what may be timed."""
        self.parity: dict[tuple[int, Provider], Any] = {}
        red = False
        with Gate(self.shape, self.settings.device) as gate:
            for case in cases:
                for provider in case.providers:
                    if provider.path == "eager" or self._late():
                        continue
                    checked = attempt(partial(gate.checked, provider, case.batch), self.device)
                    parity = checked.get("parity")
                    self.parity[case.batch, provider] = parity or checked
                    if parity is None:
                        red |= checked["failed"] != "refused"
                        self.progress.say(f"{self.shape.name}, {provider}: {checked['reason']}")
                    elif not parity.green:
                        red = True
                        self.progress.say(
                            f"{self.shape.name}, batch {case.batch}, {provider}: NOT EQUAL to the "
                            f"eager path, so not timed: {parity}"
                        )
        self.progress.say(f"{self.shape.name}: checked")
        return red

    def _late(self) -> bool:
        minutes = self.settings.minutes
        return minutes is not None and self.progress.seconds > 60 * minutes

    def _measure(self, model: Any, case: Case) -> bool:
        inputs = self.shape.inputs(case.batch, next(model.parameters()))
        wrong, first = False, None
        for provider in case.providers:
            name = f"{self.shape.name}, batch {case.batch}, {provider}"
            if self._late():
                self.progress.step(f"{name}: left out, {self.settings.minutes} minutes are over")
                continue
            parity = self.parity.get((case.batch, provider))
            if provider.path != "eager" and not getattr(parity, "green", False):
                if isinstance(parity, dict):
                    self._add(case, provider, parity, None)
                self.progress.step(f"{name}: not timed")
                continue
            row = self._row(model, inputs, case, provider)
            wrong |= row.get("failed") == "error"
            if provider.method == STOCK and provider.attention == SDPA and "ttft_ms" in row:
                kept = {name: row[name] for name in _OF_STOCK if name in row}
                self._run.stock[self.shape.name, case.batch, provider.path] = kept
            row = self._add(case, provider, row, parity)
            if first is None and "ttft_ms" in row:
                first = provider, row
            self.progress.step(f"{name}: {_told(row)}")
        if first is not None and not self._late():
            self._drift(model, inputs, case, *first)
        return wrong

    def _row(self, model: Any, inputs: Any, case: Case, provider: Provider) -> Row:
        if provider.attention == FLASH and (why := flash_missing(self.device)) is not None:
            return {"failed": "refused", "reason": why}
        given = self.settings
        generates = given.generates if provider in case.whole else 0
        effort = Effort(given.runs, generates, given.new_tokens)
        return attempt(lambda: measured(model, inputs, provider, effort), self.device)

    def _drift(self, model: Any, inputs: Any, case: Case, provider: Provider, row: Row) -> None:
        """The first provider once more at the end: a machine that drifts shows."""
        effort = Effort(min(_DRIFT_RUNS, self.settings.runs), parts=False)
        again = attempt(lambda: measured(model, inputs, provider, effort), self.device)
        if "ttft_ms" in again:
            self._run.store.add(row | {"ttft_ms_at_the_end": again["ttft_ms"]})

    def _add(self, case: Case, provider: Provider, row: Row, parity: Any) -> Row:
        of = self._run.stock
        about = {
            "bench": "ttft",
            "model": self.shape.name,
            "batch": case.batch,
            "images": 1,
            **provider.to_dict(),
            "visual_tokens": self.shape.visual,
            "text_tokens": sum(self.shape.text),
            "entries": self.shape.entries(),
            "dtype": "bfloat16",
            "weights": "random",
            "meaningful": self.device.type == "cuda" and not self.settings.tiny,
            "parity": None if parity is None else parity.to_dict(),
            # of this process: what speed-ups are against
            "stock": {p: of[at] for p in ROUTES if (at := (self.shape.name, case.batch, p)) in of},
        }
        row = about | row
        return self._run.store.add(row | floors(self.shape, case.batch, row, self._run.ceilings))


def floors(shape: Shape, batch: int, row: Row, ceilings: Ceilings) -> Row:
    """FLOPs and bytes of each part, for what was kept, and the least time for them."""
    if "ttft_ms" not in row:
        return {}
    patches = row.get("block_patches") or None
    kept = row.get("layer_mean_tokens", shape.visual)
    encoded = shape.visual
    if row["method"] == "downsample":
        # the overview alone, of as many tokens as are kept
        crops, long = shape.patches
        encoded, patches = kept, [batch * kept * crops * long / shape.visual] * shape.tower.blocks
    entries = shape.entries() - shape.visual + kept
    # newline tokens stay where one of their row does: of few tokens, about as many
    entries -= max(0, shape.newlines - kept)
    works = {
        "encoder": encoder(shape, batch, patches, encoded),
        "gather": gather(shape, batch, entries),
        "prefill": prefill(shape, batch, entries),
        "decode": decode(shape, batch, entries),
    }
    return {
        "work": {name: [w.bytes, w.flops] for name, w in works.items()},
        "floor_ms": {name: ceilings.floor_ms(w) for name, w in works.items()},
        **ceilings.to_dict(),
    }


def _told(row: Row) -> str:
    if "failed" in row:
        return f"{row['failed']}: {row['reason']}"
    return f"{row['ttft_ms']:.2f} ms"
