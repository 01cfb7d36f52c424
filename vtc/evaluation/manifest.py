"""How lmms-eval finds the model `vtc`; loaded at each of its starts, so it imports nothing."""

from __future__ import annotations

from typing import Any


def manifests() -> list[Any]:
    """The entry point of group `lmms_eval.models`: class paths as text, torch only when chosen."""
    from lmms_eval.models.registry_v2 import ModelManifest

    return [
        ModelManifest(
            model_id="vtc",
            chat_class_path="vtc.evaluation.model.Vtc",
            aliases=("visual_token_compression",),
        )
    ]
