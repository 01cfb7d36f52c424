"""Options that methods are tried with in the matrix, and which methods are tried less often."""

from __future__ import annotations

from typing import Any

# methods that only compose what others of their site run in full, see `cells`: scores before the
# LLM, sums of encoder features, cuts in the encoder and between decoder layers, and merges there
COMPOSED_ONLY = frozenset(
    [
        "cdpruner",
        "dart",
        "divprune",
        "evs",
        "fastervlm",
        "hiprune",
        "hired",
        "holov",
        "mmtok",
        "paint",
        "pixelprune",
        "prumerge",
        "prumerge_plus",
        "pyramiddrop",
        "scope",
        "uniform",
        "vispruner",
    ]
)
# dimensions in which some tokens of the tiny models stand out, text and visual, and others do not
SINKS = {"dims": (3, 17, 40), "tau": 1.8}
# options that are worth a run of their own; `tau` "between" is one of TAU, a calibration "drawn"
# one of random numbers
VARIANTS: dict[str, tuple[dict[str, Any], ...]] = {
    "todre": (
        {"tau": "between"},
        {"tau": 1.0, "objective": "k_center"},
        {"tau": "between", "stage1": False},
    ),
    "sparsevlm": ({}, {"variant": "plus"}),
    # the keys of tiny models are far apart
    "pact": ({"cutoff": 0.6},),
    # noise, of which as many cells as not are alike
    "pixelprune": ({"tau": 4.0},),
    # the tiny images have no 32 others
    "prumerge": ({"nearest": 8},),
    "prumerge_plus": ({"nearest": 8},),
    "naavit": (
        {"calibration": "drawn"},
        {"calibration": "drawn", "skip_ffn": True},
        {"layers": (0, 2)},
    ),
    "shortv": ({"calibration": "drawn"}, {"layers": (1, 2)}),
    "ima_skip": (
        {"interval": 1},
        {"operator": "attention", "interval": None},
        {"operator": "block", "interval": (1, 2), "end": 4},
    ),
    "yopo": (
        {"window": 3, "heads": 0.5, "calibration": "drawn"},
        {"window": 5, "heads": 0.5, "renormalize": False, "calibration": "drawn"},
        {"window": 3, "heads": 1.0},
    ),
    "sink_removal": (
        SINKS,
        {"mode": "mask", **SINKS},
        {"mode": "mask", "calibration": "drawn", "tau": 1.7},
    ),
    "var": (
        {"rho": 0.3, "p": 0.4, "least": 0.45, **SINKS},
        {"rho": 0.2, "p": 0.6, "least": 0.5, "except_last": True, **SINKS},
    ),
}
# between the attention that some rows of MIXED or "ragged" pay to their images and what others do:
# to what stage 1 left, and to all
TAU = {
    "llava": (0.61, 0.755),
    "llava_siglip": (0.76, 0.90),
    "llava_next": (0.58, 0.77),
    "llava_onevision": (0.60, 0.73),
    "qwen2_vl": (0.55, 0.70),
    "qwen2_5_vl": (0.50, 0.74),
    "qwen3_vl": (0.58, 0.75),
    "internvl": (0.60, 0.78),
}
