"""What is measured in which order: the targets of each model first."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from vtc.bench.families import SHAPES, tiny
from vtc.bench.providers import (
    FLASH,
    PATHS,
    STOCK,
    Provider,
    Route,
    provided,
    stock,
    with_keep,
)
from vtc.bench.shapes import Shape

THREE = ("vtc_cls", "todre", "flowcut")
PARTS = ("main", "blocks", "methods", "flash")
# 11.1 % and 33.3 % of the tokens of each
_KEEPS = {
    "llava-1.5-7b": (64,),
    "llava-next-7b": (160, 288, 640),
    "qwen2.5-vl-7b": (144,),
    "internvl3-8b": (369,),
}
_BOTH = (64, 192)
_INSIDE = ("flowcut", "downsample")


@dataclass(frozen=True)
class Settings:
    """Attributes:
    device: where it runs.
    models: names of `SHAPES`.
    parts: of `PARTS`: the targets; on LLaVA-1.5 methods that cut in the encoder at its largest
        batch, and all methods; flash attention.
    paths: of `ROUTES`.
    methods: names; None: those of the part.
    batches: of LLaVA-1.5's targets.
    runs: of each call.
    generates: whole generates of a provider.
    new_tokens: of those.
    minutes: after which no more providers are begun; None: no limit.
    tiny: toy models, to try the code.
    """

    device: str
    models: Sequence[str] = tuple(SHAPES)
    parts: Sequence[str] = PARTS
    paths: Sequence[Route] = PATHS
    methods: Sequence[str] | None = None
    batches: Sequence[int] = (1, 8)
    runs: int = 20
    generates: int = 3
    new_tokens: int = 128
    minutes: float | None = None
    tiny: bool = False


@dataclass(frozen=True)
class Case:
    """Prompts of one shape, and what runs on them.

    Attributes:
        batch: prompts.
        providers: the stock model first.
        whole: those that generate many tokens too.
    """

    batch: int
    providers: Sequence[Provider]
    whole: Sequence[Provider] = field(default=())


def planned(settings: Settings) -> list[tuple[Shape, list[Case]]]:
    """Models and their cases in the order in which they are measured: the targets of each, then the
    other methods, so that a run that is cut off has what matters most."""
    plan = []
    for name in settings.models:
        shape = tiny(SHAPES[name]) if settings.tiny else SHAPES[name]
        scale = shape.visual / SHAPES[name].visual
        keeps = [max(1, round(keep * scale)) for keep in _KEEPS[name]]
        found = []
        if "main" in settings.parts:
            found += _main(shape, keeps, settings)
        if "flash" in settings.parts:
            found.append(Case(1, _flash(keeps[0], settings)))
        if found:
            plan.append((shape, found))
    if "llava-1.5-7b" in settings.models:
        shape = SHAPES["llava-1.5-7b"]
        shape = tiny(shape) if settings.tiny else shape
        known = {
            (c.batch, p) for s, cases in plan if s == shape for c in cases for p in c.providers
        }
        others = []
        for case in _others(shape, settings):
            new = [p for p in case.providers if (case.batch, p) not in known]
            others.append(Case(case.batch, new))
        if others:
            plan.append((shape, others))
    return plan


def _others(shape: Shape, settings: Settings) -> list[Case]:
    """All methods on LLaVA-1.5, and those whose saving is in the encoder."""
    scale = shape.visual / SHAPES["llava-1.5-7b"].visual
    keeps = [max(1, round(keep * scale)) for keep in _BOTH]
    found = []
    if "blocks" in settings.parts:
        # eagerly, where blocks can be timed one by one, on a batch that keeps the device busy
        inside = provided(_INSIDE, keeps[:1], shape.visual, ("eager",))
        found.append(Case(max(settings.batches), [Provider(), *inside]))
    if "methods" in settings.parts:
        every = provided(settings.methods or with_keep(), keeps, shape.visual, settings.paths)
        found.append(Case(1, [*stock(settings.paths), *every]))
    return found


def _main(shape: Shape, keeps: Sequence[int], settings: Settings) -> list[Case]:
    methods = settings.methods or THREE
    first = stock(settings.paths)
    found = []
    for batch in settings.batches if shape.name.startswith("llava-1.5") else (1,):
        named = methods if batch == 1 else methods[:1]
        providers = [*first, *provided(named, keeps, shape.visual, settings.paths)]
        long = batch == 1 and shape.name.startswith("llava-1.5")
        whole = [p for p in providers if p.method in (STOCK, methods[0])] if long else []
        found.append(Case(batch, providers, whole))
    return found


def _flash(keep: int, settings: Settings) -> list[Provider]:
    methods = (settings.methods or THREE)[:1]
    return [Provider(attention=FLASH), *(Provider(m, keep, attention=FLASH) for m in methods)]
