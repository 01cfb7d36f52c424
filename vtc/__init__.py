"""Compress the visual tokens of stock multimodal LLMs: `vtc.patch(model, "vtc_cls", keep=64)`."""

from vtc import errors
from vtc.calibration import Calibration, calibrate
from vtc.composition import compose
from vtc.errors import VtcError
from vtc.methods.base import Method
from vtc.methods.registry import method, methods, register
from vtc.recipes import recipe
from vtc.runtime.handle import Handle, patch, unpatch
from vtc.types import Budget, Selection, Signal, Tokens

__version__ = "0.1.0"
__all__ = [
    "Budget",
    "Calibration",
    "Handle",
    "Method",
    "Selection",
    "Signal",
    "Tokens",
    "VtcError",
    "calibrate",
    "compose",
    "errors",
    "method",
    "methods",
    "patch",
    "recipe",
    "register",
    "unpatch",
]
