"""What one provider takes on one prompt: time to the first logits two ways, its parts, memory, and
whole generates."""

from __future__ import annotations

import gc
import os
import statistics
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers

import vtc
from vtc.bench import splits
from vtc.bench.providers import Provider
from vtc.bench.rows import Row
from vtc.bench.shapes import Inputs
from vtc.bench.timing import named, wait, whole_ms
from vtc.errors import VtcError
from vtc.runtime.report import kv_bytes

WARM = 2
PARTS = 3
# calls that take long are timed less often
_SLOW_MS = 150
_SPLIT = ("encoder_ms", "selector_ms", "prefill_ms")


@dataclass(frozen=True)
class Effort:
    """How much is measured.

    Attributes:
        runs: of each call.
        generates: runs of a whole generate; 0: none.
        new_tokens: of those.
        parts: whether to look at scores, choice and gather of eager paths, and at their blocks.
    """

    runs: int = 20
    generates: int = 0
    new_tokens: int = 128
    parts: bool = True


@torch.no_grad()
def measured(model: Any, inputs: Inputs, provider: Provider, effort: Effort) -> Row:
    """The numbers of a row. All that is timed has run before.

    Raises:
        VtcError: the model cannot run this way.
    """
    device = model.device

    def forward() -> Any:
        return model(**inputs, logits_to_keep=1)

    def generate(new: int = 1) -> Any:
        least = {"min_new_tokens": new} if new > 1 else {}
        return model.generate(**inputs, max_new_tokens=new, do_sample=False, **least)

    emptied(device)
    with provider.on(model) as handle:
        row: Row = {"first_call_ms": whole_ms(forward, device)}
        generate()
        slow = whole_ms(forward, device) > _SLOW_MS
        for _ in range(1 if slow else WARM):
            forward()
            generate()
        if effort.generates:
            generate(effort.new_tokens)
        _reset(device)
        row |= _first_logits(model, handle, forward, effort.runs)
        row |= _memory(device)
        again = max(1, effort.runs // 2) if slow else effort.runs
        row |= named("generate_1_ms", [whole_ms(generate, device) for _ in range(again)])
        row |= {"runs": effort.runs, "generate_1_runs": again}
        if effort.parts and provider.path == "eager":
            row |= _parts(model, handle, forward)
        row |= _accounts(handle, forward)
        if effort.generates:
            row |= _whole(generate, row, effort, device)
        else:
            generate()
        if handle is not None:
            row["fast_generate"] = handle.report().fast
    return row


def _first_logits(model: Any, handle: Any, call: splits.Call, runs: int) -> Row:
    """Time to the first logits, and of it the encoder, what the method adds behind it, and the
    rest: the prefill with its launches."""
    times, parts = [], []
    with splits.encoder_and_selection(model, handle) as read:
        for _ in range(runs):
            times.append(whole_ms(call, model.device))
            parts.append(read())
    row: Row = named("ttft_ms", times)
    known = [(e, s or 0.0, t - e - (s or 0.0)) for (e, s), t in zip(parts, times, strict=True) if e]
    if known:
        for name, own in zip(_SPLIT, zip(*known, strict=True), strict=True):
            row |= named(name, own)
        if handle is not None:
            row["selection_share"] = row["selector_ms"] / row["ttft_ms"]
    return row


def _parts(model: Any, handle: Any, call: splits.Call) -> Row:
    row: Row = {"block_ms": splits.of_blocks(model, call, PARTS)}
    return row if handle is None else row | splits.of_operations(model, call, PARTS)


def _accounts(handle: Any, call: splits.Call) -> Row:
    """What was kept, and what ran it."""
    out = call()
    row: Row = {"kv_bytes": kv_bytes(out.past_key_values)}
    if handle is None:
        return row
    report = handle.report()
    return row | {
        "kept_tokens": list(report.kept_tokens),
        "llm_tokens": list(report.llm_tokens),
        "layer_mean_tokens": report.layer_mean_tokens,
        "block_patches": list(report.block_patches),
        "kernels": report.kernels,
        "fast": report.fast,
        "graph_bytes": report.graph_bytes,
    }


def _whole(generate: Callable[[int], Any], row: Row, effort: Effort, device: torch.device) -> Row:
    """A generate of many tokens; of its time, what is not that of one of a single token is that of
    the later ones."""
    new = effort.new_tokens
    times = [whole_ms(lambda: generate(new), device) for _ in range(effort.generates)]
    later = (statistics.median(times) - row["generate_1_ms"]) / max(new - 1, 1)
    return {
        **named("generate_ms", times),
        "generate_runs": len(times),
        "new_tokens": new,
        "tpot_ms": later,
    }


def _reset(device: torch.device) -> None:
    if device.type == "cuda":
        wait(device)
        torch.cuda.reset_peak_memory_stats(device)


def _memory(device: torch.device) -> Row:
    """The allocator's peaks, weights and graphs included; None on the CPU."""
    cuda = device.type == "cuda"
    return {
        "peak_memory_bytes": torch.cuda.max_memory_allocated(device) if cuda else None,
        "peak_reserved_bytes": torch.cuda.max_memory_reserved(device) if cuda else None,
    }


def attempt(measure: Callable[[], Row], device: torch.device) -> Row:
    """The row, or what went wrong and where: `failed` is "refused", "out of memory" or "error"."""
    try:
        return measure()
    except VtcError as error:
        failed = {"failed": "refused", "reason": str(error)}
    except torch.cuda.OutOfMemoryError as error:
        failed = {"failed": "out of memory", "reason": _first_line(error), "where": where(error)}
    except Exception as error:
        # the other providers are still worth the time on the device
        failed = {
            "failed": "error",
            "reason": f"{type(error).__name__}: {_first_line(error)}",
            "where": where(error),
        }
        traceback.print_exc()
    emptied(device)
    return failed


def emptied(device: torch.device) -> None:
    """Nothing that earlier providers left, graphs included, holds memory behind this."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def where(error: BaseException) -> str:
    """The innermost place in a model's or this package's code."""
    frames = traceback.extract_tb(error.__traceback__)
    packages = [str(Path(str(module.__file__)).parent) for module in (transformers, vtc)]
    own = [f for f in frames if any(f.filename.startswith(p + os.sep) for p in packages)]
    last = (own or list(frames))[-1]
    return f"{last.filename.rsplit('/', 1)[-1]}, {last.name}, line {last.lineno}"


def _first_line(error: BaseException) -> str:
    return str(error).strip().partition("\n")[0]
