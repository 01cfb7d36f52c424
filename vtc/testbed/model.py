"""Where the trained models are, and how the `llava` one is built."""

from __future__ import annotations

from pathlib import Path

from vtc.testbed import families
from vtc.testbed.families import FAMILIES
from vtc.testbed.families.llava import GRID, PATCH, build_model, build_processor

__all__ = ["FAMILIES", "GRID", "PATCH", "build_model", "build_processor", "model_folder"]

MODELS = Path(__file__).parent / "models"


def model_folder(family: str = "llava") -> Path:
    """The folder of the trained model of a family, for `from_pretrained`.

    `AutoModelForImageTextToText.from_pretrained(model_folder("qwen2_vl"))` and
    `AutoProcessor.from_pretrained(model_folder("qwen2_vl"))` load it, offline.

    Raises:
        OptionError: no such family.
    """
    families.family(family)
    return MODELS / family
