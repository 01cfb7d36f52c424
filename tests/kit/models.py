"""Tiny stock models with random weights, one per family, in eval mode and fp32."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

PAD, EOS = 0, 1
IMAGE, VIDEO, START, END = 90, 91, 92, 93
# a placeholder id emitted as text is an error of the stock models: tests suppress these
PLACEHOLDERS = [IMAGE, VIDEO]

PATCH = 4
MERGE = 2
FRAMES_PER_PATCH = 2
# pixels of one crop or tile, for the families that have a fixed one
CROP = {"llava": 24, "llava_siglip": 24, "llava_next": 12, "llava_onevision": 16, "internvl": 24}
PINPOINTS = {
    family: [[h * CROP[family], w * CROP[family]] for h, w in ((1, 2), (2, 1), (2, 2), (1, 3))]
    for family in ("llava_next", "llava_onevision")
}
# images of four crops and of three are resized to fewer tokens then, as large ones are in reality
ASPECT = "anyres_max_2"

QWEN = ("qwen2_vl", "qwen2_5_vl", "qwen3_vl")
FAMILIES = ("llava", "llava_siglip", "llava_next", "llava_onevision", *QWEN, "internvl")
WITH_VIDEO = ("llava_onevision", *QWEN, "internvl")


def text_config(layers: int, **more: Any) -> dict[str, Any]:
    """What all language models have in common."""
    return {
        "vocab_size": 100,
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": layers,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 2048,
        "pad_token_id": PAD,
        "bos_token_id": 2,
        "eos_token_id": EOS,
        **more,
    }


def tower_config(family: str, blocks: int, **more: Any) -> dict[str, Any]:
    """What all encoders of fixed-size crops have in common."""
    return {
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": blocks,
        "num_attention_heads": 2,
        "image_size": CROP[family],
        "patch_size": PATCH,
        **more,
    }


def _llava(blocks: int, layers: int, config: dict[str, Any], tower: str = "clip") -> Any:
    from transformers import (
        CLIPVisionConfig,
        LlamaConfig,
        LlavaConfig,
        LlavaForConditionalGeneration,
        SiglipVisionConfig,
    )

    kind = CLIPVisionConfig if tower == "clip" else SiglipVisionConfig
    given = {
        "vision_config": kind(**tower_config("llava", blocks)),
        "text_config": LlamaConfig(**text_config(layers)),
        "image_token_id": IMAGE,
        "vision_feature_layer": -2,
        "vision_feature_select_strategy": "default" if tower == "clip" else "full",
    }
    return LlavaForConditionalGeneration(LlavaConfig(**(given | config)))


def _llava_siglip(blocks: int, layers: int, config: dict[str, Any]) -> Any:
    return _llava(blocks, layers, config, tower="siglip")


def _llava_next(blocks: int, layers: int, config: dict[str, Any]) -> Any:
    from transformers import (
        CLIPVisionConfig,
        LlamaConfig,
        LlavaNextConfig,
        LlavaNextForConditionalGeneration,
    )

    given = {
        "vision_config": CLIPVisionConfig(**tower_config("llava_next", blocks)),
        "text_config": LlamaConfig(**text_config(layers)),
        "image_token_id": IMAGE,
        "image_grid_pinpoints": PINPOINTS["llava_next"],
    }
    return LlavaNextForConditionalGeneration(LlavaNextConfig(**(given | config)))


def _llava_onevision(blocks: int, layers: int, config: dict[str, Any]) -> Any:
    from transformers import (
        LlavaOnevisionConfig,
        LlavaOnevisionForConditionalGeneration,
        Qwen2Config,
        SiglipVisionConfig,
    )

    tower = tower_config("llava_onevision", blocks, vision_use_head=False)
    given = {
        "vision_config": SiglipVisionConfig(**tower),
        "text_config": Qwen2Config(**text_config(layers)),
        "image_token_id": IMAGE,
        "video_token_id": VIDEO,
        "image_grid_pinpoints": PINPOINTS["llava_onevision"],
        "vision_aspect_ratio": ASPECT,
    }
    return LlavaOnevisionForConditionalGeneration(LlavaOnevisionConfig(**(given | config)))


def _qwen(kind: str, vision: dict[str, Any], text: dict[str, Any], config: dict[str, Any]) -> Any:
    import transformers

    vision = {
        "num_heads": 2,
        "patch_size": PATCH,
        "spatial_merge_size": MERGE,
        "temporal_patch_size": FRAMES_PER_PATCH,
        **vision,
    }
    given = {
        "vision_config": vision,
        "text_config": text,
        "image_token_id": IMAGE,
        "video_token_id": VIDEO,
        "vision_start_token_id": START,
        "vision_end_token_id": END,
    }
    made = getattr(transformers, f"{kind}Config")(**(given | config))
    return getattr(transformers, f"{kind}ForConditionalGeneration")(made)


def _rope(*sections: int, **more: Any) -> dict[str, Any]:
    return {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": list(sections), **more}


def _qwen2_vl(blocks: int, layers: int, config: dict[str, Any]) -> Any:
    # hidden_size is that of the language model here, embed_dim the encoder's
    vision = {"depth": blocks, "embed_dim": 64, "hidden_size": 64, "mlp_ratio": 2}
    return _qwen("Qwen2VL", vision, text_config(layers, rope_parameters=_rope(2, 3, 3)), config)


def _qwen2_5_vl(blocks: int, layers: int, config: dict[str, Any]) -> Any:
    vision = {
        "depth": blocks,
        "hidden_size": 64,
        "out_hidden_size": 64,
        "intermediate_size": 96,
        "window_size": 2 * PATCH * MERGE,
        "fullatt_block_indexes": [2, blocks - 1],
        "tokens_per_second": 2,
    }
    return _qwen("Qwen2_5_VL", vision, text_config(layers, rope_parameters=_rope(2, 3, 3)), config)


def _qwen3_vl(blocks: int, layers: int, config: dict[str, Any]) -> Any:
    vision = {
        "depth": blocks,
        "hidden_size": 64,
        "out_hidden_size": 64,
        "intermediate_size": 96,
        "num_position_embeddings": 64,
        "deepstack_visual_indexes": [1, 3],
    }
    rope = _rope(4, 2, 2, mrope_interleaved=True)
    text = text_config(layers, head_dim=16, rope_parameters=rope)
    return _qwen("Qwen3VL", vision, text, config)


def _internvl(blocks: int, layers: int, config: dict[str, Any]) -> Any:
    from transformers import (
        InternVLConfig,
        InternVLForConditionalGeneration,
        InternVLVisionConfig,
        Qwen2Config,
    )

    side = CROP["internvl"] // PATCH // MERGE
    tower = tower_config("internvl", blocks, layer_scale_init_value=1.0)
    given = {
        "vision_config": InternVLVisionConfig(**tower),
        "text_config": Qwen2Config(**text_config(layers)),
        "image_token_id": IMAGE,
        "image_seq_length": side * side,
        "tie_word_embeddings": False,
    }
    return InternVLForConditionalGeneration(InternVLConfig(**(given | config)))


_BUILDERS: dict[str, Callable[[int, int, dict[str, Any]], Any]] = {
    "llava": _llava,
    "llava_siglip": _llava_siglip,
    "llava_next": _llava_next,
    "llava_onevision": _llava_onevision,
    "qwen2_vl": _qwen2_vl,
    "qwen2_5_vl": _qwen2_5_vl,
    "qwen3_vl": _qwen3_vl,
    "internvl": _internvl,
}


def _sharpen(model: Any) -> None:
    """Random initial weights attend almost evenly: make scores and answers differ."""
    for name, weight in model.named_parameters():
        if name.endswith(("q_proj.weight", "k_proj.weight")):
            weight.mul_(8)
        elif name.endswith("qkv.weight"):
            weight[: 2 * weight.shape[1]].mul_(8)
        elif name.endswith(("self_attn.q_norm.weight", "self_attn.k_norm.weight")):
            weight.mul_(2)
        elif name.endswith(("embeddings.cls_token", "embeddings.position_embeddings")):
            weight.normal_(std=0.2)


def build_model(
    family: str, *, blocks: int = 6, layers: int | None = None, seed: int = 10, **config: Any
) -> Any:
    """A model of `family` with this many encoder blocks and decoder layers (4, or what DeepStack
    needs); `config` replaces arguments of its config."""
    torch.manual_seed(seed)
    layers = layers or (5 if family == "qwen3_vl" else 4)
    model = _BUILDERS[family](blocks, layers, config)
    with torch.no_grad():
        _sharpen(model)
    model.generation_config.pad_token_id = PAD
    model.generation_config.eos_token_id = None
    return model.eval()
