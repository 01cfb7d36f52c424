"""The accounting of the last call: what was kept, where, and what it cost."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from itertools import groupby
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from vtc.plans import LayerRule

if TYPE_CHECKING:
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
        kept_tokens: per image, tokens left after the last cut that left any (cuts between decoder
            layers come after the LLM's entrance).
        layer_mean_tokens: tokens per image, averaged over images and decoder layers; a layer in
            which visual rows skip something counts none.
        active_fraction: mean over images of their tokens, averaged over layers in that way, over
            visual_tokens.
        active_fractions: the same per image.
        kept_fraction: mean over images of kept_tokens / visual_tokens.
        kept_fractions: the same per image.
        stand_in: what was read in the place of a [CLS] that the encoder does not have.
        block_patches: patches through each encoder block, over all images; empty where none are
            cut there.
        layer_tokens: visual tokens, over all images, in each decoder layer; empty where none are
            cut there.
        attention_skipped: decoder layers in which visual rows skip attention.
        ffn_skipped: decoder layers in which they skip the feed-forward network.
        kv_lengths: entries of each decoder layer's cache after the prefill.
        encoder_ms: vision tower, projector and probes.
        selector_ms: scores, choice and compaction, those of cuts inside the encoder too (but where
            the encoder is captured: there they count as its own) and of cuts between decoder
            layers.
        ttft_ms: from the call to the first token's logits; of a direct forward, to its last hidden
            states.
        tpot_ms: per later token.
        new_tokens: columns that generate added; None for a direct forward.
        kv_bytes: keys and values after the prompt, all layers; a static cache counts as allocated.
        peak_memory_bytes: the allocator's peak on CUDA since it was last reset; None on the CPU.
        kernels: which implementation of each tensor operation ran, `"torch"` or `"triton"`.
        fast: by part (encoder, prefill, decode), `"cuda"` where it was captured as a graph, else
            why not; empty without `fast=True`.
        graph_bytes: device memory of what is captured, with its caches; None without `fast=True`.
    """

    method: str
    keep: float | int | None
    positions: str
    visual_tokens: tuple[int, ...]
    llm_tokens: tuple[int, ...]
    kept_tokens: tuple[int, ...]
    layer_mean_tokens: float
    active_fraction: float
    active_fractions: tuple[float, ...]
    kept_fraction: float
    kept_fractions: tuple[float, ...]
    encoder_ms: float | None
    selector_ms: float | None
    ttft_ms: float | None
    tpot_ms: float | None
    new_tokens: int | None
    kv_bytes: int | None
    kv_lengths: tuple[int, ...]
    block_patches: tuple[int, ...]
    layer_tokens: tuple[int, ...]
    attention_skipped: tuple[int, ...]
    ffn_skipped: tuple[int, ...]
    stand_in: str | None
    peak_memory_bytes: int | None
    kernels: dict[str, str]
    fast: dict[str, str]
    graph_bytes: int | None

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
    if value in ((), {}):
        return "-"
    if isinstance(value, dict):
        return ", ".join(f"{part}: {said}" for part, said in value.items())
    if name in ("attention_skipped", "ffn_skipped"):
        return " ".join(map(str, value))
    if name in ("kv_lengths", "block_patches", "layer_tokens"):
        return " ".join(f"{n}×{len(list(same))}" for n, same in groupby(value))
    if isinstance(value, tuple):
        distinct = sorted(set(value))
        shown = [
            f"{v:.4g}" for v in (distinct if len(distinct) <= 2 else (distinct[0], distinct[-1]))
        ]
        return f"{' … '.join(shown)}  ({len(value)} images)"
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def report_of(session: Session, call: Call, positions: str) -> Report:
    """The report of one call."""
    visual, reached = call.images.lengths, tuple(call.selection.slots.tolist())
    kept, layers = _through_layers(session, call, reached)
    fractions = tuple(k / n for k, n in zip(kept, visual, strict=True))
    rules = call.plans[0].rules if call.plans else (LayerRule(),) * len(layers)
    active = [
        there if rule.active else (0,) * len(visual)
        for there, rule in zip(layers, rules, strict=True)
    ]
    means = [sum(tokens) / len(layers) for tokens in zip(*active, strict=True)]
    actives = tuple(mean / n for mean, n in zip(means, visual, strict=True))
    clock = call.clock
    encoder, selector = clock.ms("start", "encoded"), clock.ms("encoded", "selected")
    inside, between = clock.spanned("encoder"), clock.spanned("llm")
    decides = selector is not None or clock.spans
    decode, later = clock.ms("first", "end"), (call.new_tokens or 0) - 1
    return Report(
        method=session.method.name,
        keep=call.keep,
        positions=positions,
        visual_tokens=visual,
        llm_tokens=reached,
        kept_tokens=kept,
        layer_mean_tokens=sum(means) / len(means),
        active_fraction=sum(actives) / len(actives),
        active_fractions=actives,
        kept_fraction=sum(fractions) / len(fractions),
        kept_fractions=fractions,
        encoder_ms=None if encoder is None else encoder - inside,
        selector_ms=(selector or 0.0) + inside + between if decides else None,
        ttft_ms=clock.ms("start", "first"),
        tpot_ms=decode / later if decode is not None and later > 0 else None,
        new_tokens=call.new_tokens,
        kv_bytes=call.kv_bytes,
        kv_lengths=call.kv_lengths,
        block_patches=call.block_patches,
        layer_tokens=tuple(map(sum, layers)) if call.later else (),
        attention_skipped=tuple(i for i, rule in enumerate(rules) if not rule.attention),
        ffn_skipped=tuple(i for i, rule in enumerate(rules) if not rule.ffn),
        stand_in=session.tower.signals.stand_in,
        peak_memory_bytes=_peak_memory(clock.device),
        kernels=dict(sorted(session.ran.items())),
        fast={} if session.fast is None else dict(session.fast.told),
        graph_bytes=None if session.fast is None else session.fast.held_bytes,
    )


def _through_layers(
    session: Session, call: Call, reached: tuple[int, ...]
) -> tuple[tuple[int, ...], list[tuple[int, ...]]]:
    """Per image, tokens after the last cut that left any; per decoder layer, tokens of each."""
    kept, there, layers = reached, reached, list[tuple[int, ...]]()
    for layer in range(session.tower.facts.llm_depth):
        layers.append(there)
        if (later := call.later.get(layer)) is not None:
            there = tuple(later.slots.tolist())
            kept = tuple(now or before for now, before in zip(there, kept, strict=True))
    return kept, layers


def kv_bytes(cache: Any) -> int | None:
    """Bytes of keys and values in a cache."""
    parts = [
        getattr(layer, name, None)
        for layer in getattr(cache, "layers", [])
        for name in ("keys", "values")
    ]
    found = [part.nbytes for part in parts if isinstance(part, Tensor)]
    return sum(found) if found else None


def kv_lengths(cache: Any) -> tuple[int, ...]:
    """Entries in each layer of a cache."""
    layers = getattr(cache, "layers", [])
    return tuple(int(cache.get_seq_length(i)) for i in range(len(layers)))


def _peak_memory(device: torch.device) -> int | None:
    return torch.cuda.max_memory_allocated(device) if device.type == "cuda" else None
