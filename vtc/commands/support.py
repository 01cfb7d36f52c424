"""Which method works on which family, and where it acts there: asked of the code, not written down.

`vtc methods --families` prints it, `vtc methods --markdown` is docs/methods.md.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch

import vtc
from vtc.adapters.base import Adapter, Visual
from vtc.adapters.registry import ADAPTERS
from vtc.calibration import Calibration
from vtc.errors import VtcError
from vtc.methods.base import Method
from vtc.plans import LayerPlan
from vtc.runtime.tower import facts_of
from vtc.sites import Facts
from vtc.types import Budget

# the budget at which methods with one are shown
KEEP = 0.5
NOWHERE = "nowhere: the calibration found no sinks in this model"
NEEDS = "needs a calibration: none is published for it, see `vtc calibrate`"

SITES = {
    "pixels": "before the encoder",
    "encoder": "inside the encoder",
    "llm_input": "before the LLM",
    "llm_layer": "inside the LLM",
    "llm_rows": "visual rows of decoder layers",
}
EQUALS = {
    "mask": "stock model, dropped tokens masked",
    "layer_mask": "stock model, dropped tokens masked in the layers behind each cut",
    "restatement": "the method written out in plain torch",
}


@dataclass(frozen=True)
class Support:
    """What becomes of a method on a family.

    Attributes:
        where: where it acts on the family's default configuration; empty where it is refused.
        refused: why, if it is.
        notes: kinds of input that it refuses there, and why; what stands in for a [CLS]; that a
            calibration is needed.
        needs: what `vtc.patch` says while it has no calibration; empty where it needs none, or has
            a published one or the file beside the model's weights.
    """

    where: str
    refused: str = ""
    notes: tuple[str, ...] = ()
    needs: str = ""

    def __str__(self) -> str:
        return self.where if not self.refused else f"refused: {self.refused}"


def family_names() -> list[str]:
    """The families, by the models in their brackets."""
    return [a.supported.partition("(")[2].rstrip(")") for a in ADAPTERS]


@cache
def skeletons() -> tuple[Adapter, ...]:
    """An adapter of each family on its default configuration, without weights."""
    from transformers import AutoConfig, AutoModelForImageTextToText

    found = []
    for adapter in ADAPTERS:
        config = AutoConfig.for_model(adapter.model_types[0])
        with torch.device("meta"):
            found.append(adapter(AutoModelForImageTextToText.from_config(config)))
    return tuple(found)


def support(method: Method, adapter: Adapter) -> Support:
    """What the runtime says to the method on this model."""
    needs = ""
    try:
        session = _session(method, adapter)
    except VtcError as error:
        if (calibrated := _calibrated(method, facts_of(adapter))) is None:
            return Support("", str(error))
        needs = str(error)
        try:
            # what is refused with any calibration is refused for another reason
            session = _session(calibrated, adapter)
        except VtcError as refused:
            return Support("", str(refused))
    tower, notes = session.tower, list[str]()
    if (name := tower.signals.stand_in) is not None:
        notes.append(f"{name} for [CLS]")
    if tower.cuts is not None:
        notes += [f"{kind} refused: {why}" for kind, why in _blended(adapter)]
    if needs:
        notes.append(NEEDS)
    return Support(_where(method, session, bool(needs)), notes=tuple(notes), needs=needs)


def _session(method: Method, adapter: Adapter) -> Any:
    from vtc.runtime.session import Session

    return Session(adapter, method, _some_budget(method), "keep", 0)


def _some_budget(method: Method) -> Budget:
    return Budget(None if method.count == "adaptive" else KEEP)


def _calibrated(method: Method, facts: Facts) -> Method | None:
    """The method with a calibration of made-up numbers that fits the model; None: it takes none."""
    if "calibration" not in {option.name for option in dataclasses.fields(method)}:
        return None
    heads = ((1.0,) * facts.llm_heads,) * facts.llm_depth
    layers = tuple(map(float, range(facts.llm_depth)))
    found = Calibration(layer_contribution=layers, sink_dims=(0,), head_ratio=heads)
    return dataclasses.replace(method, calibration=found)  # type: ignore[call-arg]


def _where(method: Method, session: Any, made_up: bool) -> str:
    """Where it acts, in words; `made_up`: what a calibration decides is not known."""
    facts, tower = session.tower.facts, session.tower
    first = SITES[method.site]
    if blocks := tuple(sorted({*tower.signals.blocks, *tower.signals.feature_blocks})):
        first += f" (reads {_span(blocks)} of {facts.encoder_depth} blocks)"
    if tower.cuts is not None:
        blocks = tuple(sorted(tower.cuts.blocks))
        first += " (before block 0)" if blocks == (-1,) else f" (blocks {_span(blocks)})"
    if method.site == "llm_rows":
        first = _rows(method, session, made_up)
    later = session.method.llm_layers(facts, session.budget)
    where = [] if method.site == "llm_layer" else [first]
    where += [f"after decoder layer {layer} of {facts.llm_depth}" for layer in later]
    return ", then ".join(where) or NOWHERE


def _rows(method: Method, session: Any, made_up: bool) -> str:
    """What visual rows do in which layers."""
    depth = session.tower.facts.llm_depth
    at = f" at keep={KEEP}" if method.count != "adaptive" else ""
    looks = session.method.rule_layers(session.tower.facts)
    if made_up and not looks:
        return f"{SITES['llm_rows']}, by calibration"
    found = plan_words(session.rows.plan)
    if looks:
        found.append(f"sinks looked for in {_ranges(looks)}")
    if not found:
        return NOWHERE
    return f"visual rows: {', '.join(found)} of {depth}{at}"


def plan_words(plan: LayerPlan) -> list[str]:
    """What a plan says about layers, for example `frozen in layers 2, 5–7`."""
    found: dict[str, list[int]] = {}
    for layer, rule in enumerate(plan.rules):
        if not rule.active:
            both = not (rule.attention or rule.ffn)
            said = "frozen" if both else "no FFN" if rule.attention else "no attention"
            found.setdefault(said, []).append(layer)
        if rule.radius is not None:
            said = f"neighbors at most {rule.radius} away"
            found.setdefault(said, []).append(layer)
        if rule.heads is not None and not bool(rule.heads.all()):
            found.setdefault("not read by all heads", []).append(layer)
    return [f"{said} in {_ranges(layers)}" for said, layers in found.items()]


def _ranges(layers: Iterable[int]) -> str:
    """Ascending numbers in words: `layers 0, 2, 5–7`, `layers 2, 4, …, 30`."""
    found = list(layers)
    steps = {b - a for a, b in itertools.pairwise(found)}
    if len(found) > 3 and len(steps) == 1 and steps != {1}:
        return f"layers {found[0]}, {found[1]}, …, {found[-1]}"
    runs: list[list[int]] = []
    for layer in found:
        if runs and layer == runs[-1][-1] + 1:
            runs[-1].append(layer)
        else:
            runs.append([layer])
    said = ", ".join(f"{r[0]}–{r[-1]}" if len(r) > 1 else str(r[0]) for r in runs)
    return f"layer {said}" if len(found) == 1 else f"layers {said}"


def _span(blocks: tuple[int, ...]) -> str:
    if len(blocks) == 1:
        return str(blocks[0])
    whole = len(blocks) == blocks[-1] - blocks[0] + 1
    return f"{blocks[0]}–{blocks[-1]}" if whole else ", ".join(map(str, blocks))


def _blended(adapter: Adapter) -> list[tuple[str, str]]:
    """Kinds of input of which one LLM token is made of several units of the encoder."""
    found = []
    if adapter.video_token_id is not None:
        video = Visual(((2, 2, 2),), rows=2, video=True)
        if why := adapter.blends({}, 0, video):
            found.append(("videos", why))
    if "image_sizes" in adapter.visual_inputs and adapter.tiled:
        config: Any = adapter.model.config
        side = config.vision_config.image_size
        largest = max(config.image_grid_pinpoints, key=lambda pair: pair[0] * pair[1])
        crops = 1 + largest[0] // side * (largest[1] // side)
        pixels = torch.empty(1, crops, 3, side, side, device="meta")
        inputs = {"pixel_values": pixels, "image_sizes": torch.tensor([largest])}
        (visual,) = adapter.visuals(inputs, [])
        if why := adapter.blends(inputs, 0, visual):
            found.append(("large images", why))
    return found


def markdown() -> str:
    """docs/methods.md."""
    lines = [
        "# Methods and families",
        "",
        "Written by `vtc methods --markdown` from the registry: what the code says, not what "
        "somebody remembers.",
        "",
        "| method | what | acts | keep | equals | published positions |",
        "|---|---|---|---|---|---|",
    ]
    methods = [vtc.method(name) for name in vtc.methods()]
    for m in methods:
        cells = (
            f"`{m.name}`",
            m.summary,
            SITES[m.site],
            m.count.replace("_", " "),
            EQUALS[m.exactness],
            m.published_positions,
        )
        lines.append(f"| {' | '.join(cells)} |")
    lines += [
        "",
        "## Where each acts",
        "",
        f"Layers are those of each family's default configuration, and at keep={KEEP} where the "
        "budget decides which. Where a method needs numbers about the language model, they are the "
        "published ones if that configuration is a published model's.",
        "",
    ]
    names, notes = family_names(), list[str]()
    lines += [f"| method | {' | '.join(names)} |", "|---" * (len(names) + 1) + "|"]
    for m in methods:
        found = [support(m, adapter) for adapter in skeletons()]
        marked = [str(s) + "".join(_mark(notes, note) for note in s.notes) for s in found]
        lines.append(f"| `{m.name}` | {' | '.join(marked)} |")
    lines += ["", *(f"{i}. {note}" for i, note in enumerate(notes, 1))]
    lines += ["", "## How to cite them", ""]
    for m in methods:
        if m.bibtex:
            lines += [f"`{m.name}`:", "", "```bibtex", m.bibtex.strip(), "```", ""]
    return "\n".join(lines).rstrip() + "\n"


def _mark(notes: list[str], note: str) -> str:
    if note not in notes:
        notes.append(note)
    return f" <sup>{notes.index(note) + 1}</sup>"
