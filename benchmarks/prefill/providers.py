"""What is measured: the stock model, methods over decoder layers, methods that drop tokens."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any, Literal

import vtc
from prefill.sizes import Size
from vtc.adapters.registry import adapter_of
from vtc.bench.providers import calibration

# choosing more tokens one after the other takes longer than the rest of the prefill
LATE_KEEPS = (0.22, 0.11)

Skips = Literal["", "attention", "ffn", "attention+ffn"]


@dataclass(frozen=True)
class Provider:
    """One way to run a prefill.

    Attributes:
        name: of the curve it is a point of.
        method: of vtc; None: the stock model.
        keep: as in `vtc.patch`.
        options: of the method.
        skips: what visual rows skip in the layers that the method chooses.
        layers: how many those are.
    """

    name: str
    method: str | None = None
    keep: float | None = None
    options: dict[str, Any] = field(default_factory=dict)
    skips: Skips = ""
    layers: int = 0

    @property
    def kind(self) -> Literal["stock", "rows", "dropping"]:
        """Whether tokens leave, or stay and skip work."""
        return "stock" if self.method is None else "rows" if self.skips else "dropping"

    def on(self, model: Any) -> AbstractContextManager[Any]:
        """Within it the model runs this way; the handle, or None."""
        if self.method is None:
            return nullcontext()
        return vtc.patch(model, self.method, self.keep, **self.options)

    def told(self) -> dict[str, Any]:
        """Its options, ready for JSON."""
        return {k: v for k, v in self.options.items() if k != "calibration"}


def skipping(
    name: str, model: Any, layers: int, skips: Skips = "attention+ffn", **options: Any
) -> Provider:
    """A method over layers that leaves `layers` of the model's."""
    depth = len(adapter_of(model).language_model.layers)  # type: ignore[arg-type]
    if name != "ima_skip":
        options["calibration"] = calibration(model)
    return Provider(name, name, (depth - layers) / depth, options, skips, layers)


def dropping(keep: float) -> Provider:
    """Tokens dropped before the LLM; at a fixed number of them its prefill does not depend on
    which."""
    return Provider("uniform", "uniform", keep)


def late(keep: float | None) -> Provider:
    """All tokens dropped inside the LLM, before layer 7/8 of it, of those that stage 1 left. With
    random weights text looks at pictures: a threshold of 1 is under no attention."""
    if keep is None:
        return Provider("todre, stage 2", "todre", None, {"stage1": False, "tau": 1.0})
    return Provider("todre", "todre", keep, {"tau": 1.0})


def providers(model: Any, size: Size, several: bool) -> list[Provider]:
    """All that is measured at a size; fewer kinds of it where a batch has `several` prompts."""
    found = [Provider("stock")]
    found += [skipping("shortv", model, k) for k in size.skips]
    found += [skipping("naavit", model, k, "attention") for k in size.skips]
    found += [dropping(keep) for keep in size.keeps]
    found.append(late(None))
    if not several:
        skipped = [k for k in size.skips if k]
        found += [feed_forward(model, k) for k in skipped[1::2] or skipped]
        found += [late(keep) for keep in size.keeps if keep in LATE_KEEPS]
    return found


def feed_forward(model: Any, layers: int) -> Provider:
    """Visual rows skip the feed-forward network alone, in evenly spaced layers."""
    return skipping("ima_skip", model, layers, "ffn", operator="ffn", interval=None)


def gated(model: Any) -> list[Provider]:
    """One provider of each name, for a model of few layers."""
    half = len(adapter_of(model).language_model.layers) // 2  # type: ignore[arg-type]
    return [
        skipping("shortv", model, half),
        skipping("naavit", model, half, "attention"),
        feed_forward(model, half),
        dropping(0.22),
        late(None),
        late(0.22),
    ]
