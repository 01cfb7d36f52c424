"""Rows as a GPU would give them."""

from __future__ import annotations

from typing import Any

from vtc.bench.ceilings import Ceilings
from vtc.bench.families import SHAPES
from vtc.bench.ttft import floors

Row = dict[str, Any]


def spread(name: str, value: float) -> Row:
    return {name: value, f"{name}_p20": 0.9 * value, f"{name}_p80": 1.1 * value}


ABOUT = {
    "gpu": "A GPU",
    "cpu": "x86_64",
    "torch": "2.11.0",
    "transformers": "5.17.0",
    "date": "2026-01-01",
    "commit": "abc",
}
GREEN = {"error_bf16": 0.1, "limit_bf16": 0.2, "error_fp32": 0.0, "limit_fp32": 0.1}


def ttft_row(method: str, path: str, ms: float, **more: Any) -> Row:
    """A row of LLaVA-1.5; stock takes 40 ms, 20 ms with graphs."""
    stock = {"eager": {"ttft_ms": 40.0, "generate_1_ms": 44.0, "encoder_ms": 9.0}}
    stock["fast"] = {"ttft_ms": 20.0, "generate_1_ms": 22.0, "encoder_ms": 2.0}
    row = {
        "bench": "ttft",
        "model": "llava-1.5-7b",
        "batch": 1,
        "images": 1,
        "method": method,
        "keep": None if method == "stock" else 64,
        "options": {},
        "path": path,
        "attention": "sdpa",
        "visual_tokens": 576,
        "meaningful": True,
        "parity": GREEN if path == "fast" else None,
        "stock": stock,
        "runs": 20,
        **spread("ttft_ms", ms),
        **spread("generate_1_ms", ms + 4),
        **spread("encoder_ms", 2.2),
        **spread("selector_ms", 0.0 if method == "stock" else 0.2),
        **spread("prefill_ms", ms - (2.2 if method == "stock" else 2.4)),
        **more,
    }
    if method != "stock":
        row |= {"selection_share": 0.2 / ms, "layer_mean_tokens": 64.0}
    shape = SHAPES["llava-1.5-7b"]
    return row | floors(shape, row["batch"], row, Ceilings(3e12, 7e14)) | ABOUT


def kernel_row(provider: str, ms: float, **more: Any) -> Row:
    """A row of one operation."""
    return {
        "bench": "kernels",
        "op": "compact",
        "case": "8 × 2,944 → 640 × 4096",
        "provider": provider,
        "dtype": "bfloat16",
        "what": "index arithmetic" if provider == "official" else None,
        "floor_ms": 0.02,
        "of_floor": 0.02 / ms,
        "peak_bytes": 2**20,
        "parity": {"error": 0.0, "limit": 0.0} if provider == "triton" else None,
        "meaningful": True,
        **spread("ms", ms),
        **more,
        **ABOUT,
    }


def scale_row(method: str, path: str, axis: str, point: int, **more: Any) -> Row:
    """A row of one point; out of memory where no time is given."""
    time = {k: v for k, v in more.items() if k.startswith("ttft_ms")}
    failed = {} if time else {"failed": "out of memory", "where": "modeling_llama.py, forward"}
    return {
        "bench": "scale",
        "model": "llava-next-7b",
        "axis": axis,
        "batch": point if axis == "batch" else 1,
        "images": point if axis == "images" else 1,
        "method": method,
        "keep": None if method == "stock" else 160,
        "path": path,
        "visual_tokens": 2880,
        "meaningful": True,
        "device_memory_bytes": 80 * 2**30,
        "peak_memory_bytes": None if failed else (14 + point) * 2**30,
        **failed,
        **more,
        **ABOUT,
    }
