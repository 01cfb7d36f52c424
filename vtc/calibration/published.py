"""What authors measured on known models, found by what a language model is, not by its name.

Two models of the papers are left out, because nothing tells them from others of the same kind and
size, and neither exists as a transformers checkpoint: InternVL2-8B (dimension 3584) and LLaVA-MORE
on Llama 3.1 8B (788, 1384, 4062).
"""

from __future__ import annotations

import math
from typing import Any

from vtc.sites import Facts

# kind, width, layers, key/value heads: Llama 3 8B is Vicuna 7B but for the last
_LLM = tuple[str, int, int, int]
_VICUNA_7B: _LLM = ("llama", 4096, 32, 32)
_VICUNA_13B: _LLM = ("llama", 5120, 40, 40)

# the layers whose freezing changes least, lowest first (ShortV, arXiv 2504.00502,
# icip-cas/ShortV 737c28c), by language model and whether images are cut into crops
_LAYER_ORDERS = {
    (_VICUNA_7B, False): (
        "LLaVA-1.5-7B",
        "31 29 30 28 0 26 27 25 24 22 23 21 2 3 20 18 17 12 19",
    ),
    (_VICUNA_7B, True): (
        "LLaVA-NeXT-7B",
        "31 29 30 28 26 27 22 24 21 23 25 20 19 17 18 15 12 0 2",
    ),
    (_VICUNA_13B, False): (
        "LLaVA-1.5-13B",
        "39 32 28 36 27 37 29 30 1 38 25 31 2 26 23 34 0 33 35 22 24 21 20 17",
    ),
    (_VICUNA_13B, True): (
        "LLaVA-NeXT-13B",
        "39 32 29 36 27 30 37 23 25 31 26 2 28 22 33 35 34 24 38 21 20 18 1 17",
    ),
}
_SHORTV = "layer order of ShortV (arXiv 2504.00502, icip-cas/ShortV 737c28c), as places in it"

_VAR = "sink dimensions of VAR (arXiv 2503.03321, seilk/VisAttnSink 98e62d6)"
_VAR_PAPER = "sink dimensions of VAR (arXiv 2503.03321, paper)"
_THIRD_PARTY = "sink dimensions calibrated by third parties by VAR's rule (arXiv 2503.03321)"
_SINK_DIMS: dict[_LLM, tuple[str, tuple[int, ...], str]] = {
    _VICUNA_7B: ("Vicuna 7B", (2533, 1415), _VAR),
    _VICUNA_13B: ("Vicuna 13B", (2100, 4743), _VAR),
    ("qwen2_vl_text", 3584, 28, 4): ("Qwen2-VL-7B", (458, 2570), _VAR_PAPER),
    ("qwen2_vl_text", 1536, 28, 2): ("Qwen2-VL-2B", (1073, 534, 940), _THIRD_PARTY),
    ("qwen2_5_vl_text", 3584, 28, 4): ("Qwen2.5-VL-7B", (458, 2570), _THIRD_PARTY),
    ("qwen2_5_vl_text", 2048, 36, 2): ("Qwen2.5-VL-3B", (318, 1874, 1819), _THIRD_PARTY),
    ("qwen2_5_vl_text", 5120, 64, 8): ("Qwen2.5-VL-32B", (4675, 3094), _THIRD_PARTY),
    ("qwen3_vl_text", 4096, 36, 8): ("Qwen3-VL-8B", (1838,), _THIRD_PARTY),
    ("qwen3_vl_text", 2048, 28, 8): ("Qwen3-VL-2B", (1793, 1999, 1401), _THIRD_PARTY),
    ("qwen3", 4096, 36, 8): ("InternVL3.5-8B", (2276, 233), _THIRD_PARTY),
}


def published(facts: Facts) -> dict[str, Any]:
    """Fields of a `Calibration` that papers give for this model; empty: none."""
    llm = (facts.llm_kind, facts.llm_width, facts.llm_depth, facts.llm_kv_heads)
    found: dict[str, Any] = {}
    names, sources = list[str](), list[str]()
    # the orders are those of LLaVA's own models: CLIP-L's 24 blocks, a token per patch
    if (facts.encoder_depth, facts.patches_per_token) == (24, 1):
        name, order = _LAYER_ORDERS.get((llm, facts.tiled), ("", ""))
        if order:
            place = {int(layer): float(i) for i, layer in enumerate(order.split())}
            values = (place.get(layer, math.inf) for layer in range(facts.llm_depth))
            found["layer_contribution"] = tuple(values)
            names.append(name)
            sources.append(_SHORTV)
    if llm in _SINK_DIMS:
        name, dims, source = _SINK_DIMS[llm]
        found["sink_dims"] = dims
        names.append(name)
        sources.append(source)
    if found:
        found |= {"model": " / ".join(names), "source": "; ".join(sources)}
    return found
