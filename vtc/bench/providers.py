"""Ways to run a model that are measured beside each other."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch

import vtc
from vtc.adapters.registry import adapter_of
from vtc.calibration import Calibration
from vtc.calibration.published import published
from vtc.errors import OptionError
from vtc.runtime.tower import facts_of

Route = Literal["eager", "fast", "compile"]
ROUTES: tuple[Route, ...] = ("eager", "fast", "compile")
# compiling takes half a minute for each length of the prompt
PATHS: tuple[Route, ...] = ("eager", "fast")
STOCK = "stock"
SDPA, FLASH = "sdpa", "flash_attention_2"


@dataclass(frozen=True)
class Provider:
    """One way.

    Attributes:
        method: of vtc, or `STOCK`: the model as it is.
        keep: as in `vtc.patch`.
        path: `"fast"`: with `fast=True`, `"compile"`: with `fast="compile"`; the stock model then
            under the method `"none"`.
        attention: what the model is told to attend with.
    """

    method: str = STOCK
    keep: float | int | None = None
    path: Route = "eager"
    attention: str = SDPA

    def __str__(self) -> str:
        kept = "" if self.keep is None else f"@{self.keep}"
        other = "" if self.attention == SDPA else f", {self.attention}"
        return f"{self.method}{kept} {self.path}{other}"

    def to_dict(self) -> dict[str, Any]:
        """For a row."""
        return {
            "method": self.method,
            "keep": self.keep,
            "options": {},
            "path": self.path,
            "attention": self.attention,
        }

    @contextmanager
    def on(self, model: Any) -> Iterator[Any]:
        """Within it the model runs this way; gives the handle, or None.

        Raises:
            VtcError: it cannot.
        """
        before = model.config._attn_implementation
        if self.attention != before:
            model.set_attn_implementation(self.attention)
        try:
            if self.method == STOCK and self.path == "eager":
                yield None
                return
            with self._patched(model) as handle:
                yield handle
        finally:
            if self.attention != before:
                model.set_attn_implementation(before)

    def _patched(self, model: Any) -> vtc.Handle:
        fast: Any = False
        if self.path != "eager":
            # without a GPU: the code of the fast path, not captured
            captured = True if self.path == "fast" else "compile"
            fast = captured if model.device.type == "cuda" else "eager"
        if self.method == STOCK:
            return vtc.patch(model, "none", fast=fast)
        reads = hasattr(vtc.method(self.method), "calibration")
        more: dict[str, Any] = {"calibration": calibration(model)} if reads else {}
        return vtc.patch(model, self.method, self.keep, fast=fast, **more)


def calibration(model: Any) -> Calibration:
    """All decoder layers in the published order of this model, those it does not name behind it,
    the lowest first; all heads alike."""
    facts = facts_of(adapter_of(model))
    values = published(facts).get("layer_contribution") or (math.inf,) * facts.llm_depth
    order = sorted(range(facts.llm_depth), key=lambda layer: (values[layer], layer))
    return Calibration(
        layer_contribution=tuple(float(order.index(i)) for i in range(len(order))),
        head_ratio=((0.5,) * facts.llm_heads,) * facts.llm_depth,
    )


def over_layers(method: str) -> bool:
    """Whether its keep is a share of decoder layers."""
    return vtc.method(method).site == "llm_rows"


def with_keep() -> list[str]:
    """The registered methods that take a keep."""
    found = []
    for name in vtc.methods():
        try:
            vtc.method(name).check_keep(0.5)
        except OptionError:
            continue
        found.append(name)
    return found


def provided(
    methods: Sequence[str],
    keeps: Sequence[int],
    visual: int,
    paths: Sequence[Route] = PATHS,
) -> list[Provider]:
    """Each method at each number of N visual tokens on each path; one over layers gets the share of
    layers instead."""
    return [
        Provider(method, round(keep / visual, 3) if over_layers(method) else keep, path)
        for method in methods
        for keep in keeps
        for path in paths
    ]


def stock(paths: Sequence[Route] = PATHS) -> list[Provider]:
    """The model as it is, and with the same fast path."""
    return [Provider(path=path) for path in paths]


def flash_missing(device: torch.device) -> str | None:
    """Why flash attention cannot be measured here, or None."""
    from transformers.utils import is_flash_attn_2_available

    if device.type != "cuda":
        return "it needs CUDA"
    return None if is_flash_attn_2_available() else "flash_attn is not installed here"
