"""Time to the first logits and memory against images of a prompt and against prompts, up to where
the device has no more memory."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import torch

from vtc.bench.families import SHAPES, tiny
from vtc.bench.gate import Gate
from vtc.bench.measure import attempt, emptied
from vtc.bench.progress import Progress
from vtc.bench.providers import PATHS, STOCK, Provider, Route
from vtc.bench.rows import Row, Store
from vtc.bench.shapes import Shape, build, sharpen
from vtc.bench.timing import named, wait, whole_ms

Axis = Literal["images", "batch"]
AXES: tuple[Axis, ...] = ("images", "batch")
POINTS = (1, 2, 4, 8, 16, 32)
# where stock may still fit at 32, until it does not
BEYOND = (40, 48, 64)
_SLOW_MS = 1000


@dataclass(frozen=True)
class Settings:
    """Attributes:
    device: where it runs.
    model: a name of `SHAPES`.
    method: of vtc.
    keep: tokens of each image.
    axes: of `AXES`.
    points: images of one prompt, or prompts of one image.
    beyond: more points, until the stock model is out of memory.
    paths: of the method; the stock model is always eager.
    runs: of each point; 3 at most where one takes long.
    tiny: toy models, to try the code.
    """

    device: str
    model: str = "llava-next-7b"
    method: str = "vtc_cls"
    keep: int = 160
    axes: Sequence[Axis] = AXES
    points: Sequence[int] = POINTS
    beyond: Sequence[int] = BEYOND
    paths: Sequence[Route] = PATHS
    runs: int = 5
    tiny: bool = False


def run(settings: Settings, store: Store) -> bool:
    """Measure; False if the fast path was not what it should be, or something went wrong."""
    shape = tiny(SHAPES[settings.model]) if settings.tiny else SHAPES[settings.model]
    keep = max(1, round(settings.keep * shape.visual / SHAPES[settings.model].visual))
    providers = [Provider(), *(Provider(settings.method, keep, path) for path in settings.paths)]
    total = len(settings.axes) * len(settings.points) * len(providers)
    with Progress("scale", total) as progress:
        green = _checked(shape, settings, providers, progress)
        providers = [p for p in providers if green.get(p, True)]
        model = build(shape, settings.device, torch.bfloat16)
        sharpen(model)
        progress.say(f"{shape.name}: built")
        fine = all(green.values())
        for axis in settings.axes:
            fine &= _Curve(model, shape, axis, settings, store, progress).run(providers)
    return fine


def _checked(
    shape: Shape, settings: Settings, providers: Sequence[Provider], progress: Progress
) -> dict[Provider, bool]:
    """Which fast providers are as the eager path, on two prompts and on two images."""
    found = {}
    with Gate(shape, settings.device) as gate:
        for provider in providers:
            if provider.path == "eager":
                continue
            found[provider] = True
            for batch, images in ((2, 1), (1, 2)):
                check = partial(gate.checked, provider, batch, images)
                checked = attempt(check, torch.device(settings.device))
                parity = checked.get("parity")
                if parity is None or not parity.green:
                    found[provider] = False
                    why = checked.get("reason", f"NOT EQUAL to the eager path: {parity}")
                    progress.say(f"{provider}, {batch} × {images}: not timed, {why}")
    emptied(torch.device(settings.device))
    return found


class _Curve:
    """One axis.

    Args:
        model: the model.
        shape: of it.
        axis: what grows.
        settings: of the run.
        store: of rows.
        progress: is told.
    """

    def __init__(
        self,
        model: Any,
        shape: Shape,
        axis: Axis,
        settings: Settings,
        store: Store,
        progress: Progress,
    ) -> None:
        self.model, self.shape, self.axis = model, shape, axis
        self.settings, self.store, self.progress = settings, store, progress

    def run(self, providers: Sequence[Provider]) -> bool:
        """All points of all providers, the largest last; a provider that is out of memory once is
        not tried with more."""
        over: set[Provider] = set()
        fine = True
        for point in self.settings.points:
            for provider in providers:
                fine &= self._point(provider, point, over, self.settings.runs)
        stock = [p for p in providers if p.method == STOCK]
        if self.model.device.type == "cuda" and stock:
            for point in self.settings.beyond:
                if stock[0] in over:
                    break
                for provider in providers:
                    fine &= self._point(provider, point, over, runs=1)
        return fine

    def _point(self, provider: Provider, point: int, over: set[Provider], runs: int) -> bool:
        name = f"{self.axis} {point}, {provider}"
        if provider in over:
            self.progress.step(f"{name}: left out, it was out of memory before")
            return True
        row = attempt(lambda: self._measured(provider, point, runs), self.model.device)
        batch, images = (point, 1) if self.axis == "batch" else (1, point)
        about = {
            "bench": "scale",
            "model": self.shape.name,
            "axis": self.axis,
            "batch": batch,
            "images": images,
            **provider.to_dict(),
            "visual_tokens": self.shape.visual,
            "entries": self.shape.entries(images),
            "dtype": "bfloat16",
            "weights": "random",
            "meaningful": self.model.device.type == "cuda" and not self.settings.tiny,
            "device_memory_bytes": _device_memory(self.model.device),
        }
        self.store.add(about | row)
        if row.get("failed") == "out of memory":
            over.add(provider)
            self.progress.step(f"{name}: out of memory in {row['where']}")
        else:
            told = row.get("reason") or f"{row['ttft_ms']:.1f} ms"
            self.progress.step(f"{name}: {told}")
        return row.get("failed") != "error"

    @torch.no_grad()
    def _measured(self, provider: Provider, point: int, runs: int) -> Row:
        model, device = self.model, self.model.device
        batch, images = (point, 1) if self.axis == "batch" else (1, point)
        emptied(device)
        inputs = self.shape.inputs(batch, next(model.parameters()), images)
        with provider.on(model) as handle:

            def call() -> Any:
                return model(**inputs, logits_to_keep=1)

            first = whole_ms(call, device)
            if first < _SLOW_MS:
                call()
            else:
                runs = min(3, runs)
            if device.type == "cuda":
                wait(device)
                torch.cuda.reset_peak_memory_stats(device)
            row: Row = named("ttft_ms", [whole_ms(call, device) for _ in range(runs)])
            row |= {"runs": runs, "first_call_ms": first}
            if device.type == "cuda":
                row["peak_memory_bytes"] = torch.cuda.max_memory_allocated(device)
                row["peak_reserved_bytes"] = torch.cuda.max_memory_reserved(device)
            if handle is not None:
                report = handle.report()
                row |= {"fast": report.fast, "graph_bytes": report.graph_bytes}
                row["kv_bytes"] = report.kv_bytes
        return row


def _device_memory(device: torch.device) -> int | None:
    if device.type != "cuda":
        return None
    return int(torch.cuda.get_device_properties(device).total_memory)
