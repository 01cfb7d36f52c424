"""Which method works on which family, and where it acts there: asked of the code, not written down.

`vtc methods --families` prints it, `vtc methods --markdown` is docs/methods.md.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Any

import torch

import vtc
from vtc.adapters.base import Adapter, Visual
from vtc.adapters.registry import ADAPTERS
from vtc.errors import VtcError
from vtc.methods.base import Method
from vtc.types import Budget

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
        notes: kinds of input that it refuses there, and why; what stands in for a [CLS].
    """

    where: str
    refused: str = ""
    notes: tuple[str, ...] = ()

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
    from vtc.runtime.layers import LayerSeam
    from vtc.runtime.tower import Tower

    try:
        tower = Tower(adapter, method)
        later = method.llm_layers(tower.facts, _some_budget(method))
        LayerSeam(adapter, method, later, lambda: _some_budget(method))
    except VtcError as error:
        return Support("", str(error))
    where = [SITES[method.site]]
    if blocks := tower.signals.blocks:
        where[0] += f" (reads {_span(blocks)} of {tower.facts.encoder_depth} blocks)"
    if tower.cuts is not None:
        where[0] += f" (blocks {_span(tuple(sorted(tower.cuts.blocks)))})"
    where += [f"after decoder layer {layer} of {tower.facts.llm_depth}" for layer in later]
    if method.site == "llm_layer":
        where = where[1:]
    notes = [] if (name := tower.signals.stand_in) is None else [f"{name} for [CLS]"]
    if tower.cuts is not None:
        notes += [f"{kind} refused: {why}" for kind, why in _blended(adapter)]
    return Support(", then ".join(where), notes=tuple(notes))


def _some_budget(method: Method) -> Budget:
    return Budget(None if method.count == "adaptive" else 0.5)


def _span(blocks: tuple[int, ...]) -> str:
    return f"{blocks[0]}–{blocks[-1]}" if len(blocks) > 1 else str(blocks[0])


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
        "Layers are those of each family's default configuration.",
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
