"""The accounting of the last call: what was kept, where, and what it cost."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from vtc.runtime.session import Call, Session


@dataclass(frozen=True)
class Report:
    """What one call of a patched model did. Times are None where they were not reached or do not
    apply.

    Attributes:
        method: its name.
        keep: what was asked for.
        positions: the policy in force.
        visual_tokens: per image, tokens out of the encoder that the stock model would use.
        llm_tokens: per image, tokens that reached the LLM.
        layer_mean_tokens: tokens per image, averaged over images and decoder layers.
        kept_fraction: mean over images of llm_tokens / visual_tokens.
        kept_fractions: the same per image.
        encoder_ms: vision tower, projector and probes.
        selector_ms: scores, choice and compaction.
        ttft_ms: from the call to the first token's logits; of a direct forward, to its last hidden
            states.
        tpot_ms: per later token.
        new_tokens: columns that generate added; None for a direct forward.
        kv_bytes: keys and values after the prompt, all layers; a static cache counts as allocated.
        peak_memory_bytes: the allocator's peak on CUDA since it was last reset; None on the CPU.
        kernels: which implementation of the tensor operations ran.
    """

    method: str
    keep: float | int | None
    positions: str
    visual_tokens: tuple[int, ...]
    llm_tokens: tuple[int, ...]
    layer_mean_tokens: float
    kept_fraction: float
    kept_fractions: tuple[float, ...]
    encoder_ms: float | None
    selector_ms: float | None
    ttft_ms: float | None
    tpot_ms: float | None
    new_tokens: int | None
    kv_bytes: int | None
    peak_memory_bytes: int | None
    kernels: str

    def to_dict(self) -> dict[str, Any]:
        """All fields, ready for JSON."""
        return dataclasses.asdict(self)

    def __str__(self) -> str:
        rows = [
            (name.replace("_", " "), _text(name, value)) for name, value in self.to_dict().items()
        ]
        width = max(len(name) for name, _ in rows)
        return "\n".join(f"{name:<{width}}  {value}" for name, value in rows)


def _text(name: str, value: Any) -> str:
    if value is None:
        return "-"
    if name.endswith("_bytes"):
        return f"{value / 2**20:.1f} MiB"
    if isinstance(value, tuple):
        distinct = sorted(set(value))
        shown = [
            f"{v:.4g}" for v in (distinct if len(distinct) <= 2 else (distinct[0], distinct[-1]))
        ]
        return f"{' … '.join(shown)}  ({len(value)} images)"
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def report_of(session: Session, call: Call, positions: str, kernels: str) -> Report:
    """The report of one call."""
    visual, reached = call.images.lengths, tuple(call.selection.slots.tolist())
    fractions = tuple(k / n for k, n in zip(reached, visual, strict=True))
    clock = call.clock
    decode, later = clock.ms("first", "end"), (call.new_tokens or 0) - 1
    return Report(
        method=session.method.name,
        keep=call.keep,
        positions=positions,
        visual_tokens=visual,
        llm_tokens=reached,
        layer_mean_tokens=sum(reached) / len(reached),
        kept_fraction=sum(fractions) / len(fractions),
        kept_fractions=fractions,
        encoder_ms=clock.ms("start", "encoded"),
        selector_ms=clock.ms("encoded", "selected"),
        ttft_ms=clock.ms("start", "first"),
        tpot_ms=decode / later if decode is not None and later > 0 else None,
        new_tokens=call.new_tokens,
        kv_bytes=call.kv_bytes,
        peak_memory_bytes=_peak_memory(clock.device),
        kernels=kernels,
    )


def kv_bytes(cache: Any) -> int | None:
    """Bytes of keys and values in a cache."""
    parts = [
        getattr(layer, name, None)
        for layer in getattr(cache, "layers", [])
        for name in ("keys", "values")
    ]
    found = [part.nbytes for part in parts if isinstance(part, Tensor)]
    return sum(found) if found else None


def _peak_memory(device: torch.device) -> int | None:
    return torch.cuda.max_memory_allocated(device) if device.type == "cuda" else None
