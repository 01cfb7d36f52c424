"""What papers give reaches the models that they measured, by configuration, and no others."""

from __future__ import annotations

import math
from functools import cache
from typing import Any

import pytest
import torch
import transformers

from vtc.adapters.registry import adapter_of
from vtc.calibration import calibration_of
from vtc.errors import SignalError
from vtc.runtime.tower import facts_of
from vtc.sites import Facts

ORDERS = {
    "llava 1.5 7B": [31, 29, 30, 28, 0, 26, 27, 25, 24, 22, 23, 21, 2, 3, 20, 18, 17, 12, 19],
    "llava next 7B": [31, 29, 30, 28, 26, 27, 22, 24, 21, 23, 25, 20, 19, 17, 18, 15, 12, 0, 2],
    "llava 1.5 13B": [
        *(39, 32, 28, 36, 27, 37, 29, 30, 1, 38, 25, 31),
        *(2, 26, 23, 34, 0, 33, 35, 22, 24, 21, 20, 17),
    ],
    "llava next 13B": [
        *(39, 32, 29, 36, 27, 30, 37, 23, 25, 31, 26, 2),
        *(28, 22, 33, 35, 34, 24, 38, 21, 20, 18, 1, 17),
    ],
}
DIMS = {
    "llava 1.5 7B": (2533, 1415),
    "llava next 7B": (2533, 1415),
    "llava 1.5 13B": (2100, 4743),
    "llava next 13B": (2100, 4743),
    "qwen2 vl 7B": (458, 2570),
    "qwen2 vl 2B": (1073, 534, 940),
    "qwen2.5 vl 7B": (458, 2570),
    "qwen2.5 vl 3B": (318, 1874, 1819),
    "qwen2.5 vl 32B": (4675, 3094),
    "qwen3 vl 8B": (1838,),
    "qwen3 vl 2B": (1793, 1999, 1401),
    "internvl 3.5 8B": (2276, 233),
}
# kind of model, kind of LLM, width, layers, heads, key/value heads
MODELS: dict[str, tuple[str, str, int, int, int, int]] = {
    "llava 1.5 7B": ("llava", "llama", 4096, 32, 32, 32),
    "llava 1.5 13B": ("llava", "llama", 5120, 40, 40, 40),
    "llava next 7B": ("llava_next", "llama", 4096, 32, 32, 32),
    "llava next 13B": ("llava_next", "llama", 5120, 40, 40, 40),
    "llava next mistral 7B": ("llava_next", "mistral", 4096, 32, 32, 8),
    "llava next llama 3 8B": ("llava_next", "llama", 4096, 32, 32, 8),
    "llava llama 3 8B": ("llava", "llama", 4096, 32, 32, 8),
    "qwen2 vl 7B": ("qwen2_vl", "qwen2_vl_text", 3584, 28, 28, 4),
    "qwen2 vl 2B": ("qwen2_vl", "qwen2_vl_text", 1536, 28, 12, 2),
    "qwen2.5 vl 7B": ("qwen2_5_vl", "qwen2_5_vl_text", 3584, 28, 28, 4),
    "qwen2.5 vl 3B": ("qwen2_5_vl", "qwen2_5_vl_text", 2048, 36, 16, 2),
    "qwen2.5 vl 32B": ("qwen2_5_vl", "qwen2_5_vl_text", 5120, 64, 40, 8),
    "qwen3 vl 8B": ("qwen3_vl", "qwen3_vl_text", 4096, 36, 32, 8),
    "qwen3 vl 2B": ("qwen3_vl", "qwen3_vl_text", 2048, 28, 16, 8),
    "onevision 7B": ("llava_onevision", "qwen2", 3584, 28, 28, 4),
    "internvl 3 8B": ("internvl", "qwen2", 3584, 28, 28, 4),
    "internvl 3.5 8B": ("internvl", "qwen3", 4096, 36, 32, 8),
}


@cache
def facts(name: str) -> Facts:
    kind, llm, width, layers, heads, kv_heads = MODELS[name]
    text = {
        "model_type": llm,
        "hidden_size": width,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "intermediate_size": 8,
        "vocab_size": 8,
        "pad_token_id": 0,
    }
    config: Any = transformers.AutoConfig.for_model(kind, text_config=text)
    with torch.device("meta"):
        model = transformers.AutoModelForImageTextToText.from_config(config)
    found = facts_of(adapter_of(model))
    assert (found.llm_kind, found.llm_width, found.llm_depth) == (llm, width, layers)
    return found


@pytest.mark.parametrize("name", MODELS)
def test_layer_orders(name: str) -> None:
    if name not in ORDERS:
        with pytest.raises(SignalError, match="none is published"):
            calibration_of(None, facts(name), "layer_contribution")
        return
    found = calibration_of(None, facts(name), "layer_contribution")
    scores = found.layer_contribution
    assert scores is not None and "ShortV" in found.source
    named = [layer for layer, score in enumerate(scores) if math.isfinite(score)]
    assert sorted(named, key=scores.__getitem__) == ORDERS[name]


@pytest.mark.parametrize("name", MODELS)
def test_sink_dimensions(name: str) -> None:
    if name not in DIMS:
        with pytest.raises(SignalError, match="none is published"):
            calibration_of(None, facts(name), "sink_dims")
        return
    found = calibration_of(None, facts(name), "sink_dims")
    assert found.sink_dims == DIMS[name] and "arXiv 2503.03321" in found.source


def test_head_ratios_are_published_for_none() -> None:
    with pytest.raises(SignalError, match="none is published"):
        calibration_of(None, facts("llava 1.5 7B"), "head_ratio")
