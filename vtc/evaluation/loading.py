"""A model and its processor, loaded once and shared by all runs of a sweep."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from vtc.errors import InputError, OptionError


@dataclass(frozen=True)
class Loaded:
    """A stock model in eval mode and its processor, padding on the left."""

    model: Any
    processor: Any
    pretrained: str


def load(
    pretrained: str,
    device: str | None = None,
    device_map: str | None = None,
    dtype: str = "auto",
    **extra: Any,
) -> Loaded:
    """Load any image-text-to-text model and its processor.

    Args:
        pretrained: a folder or a hub id.
        device: `"cpu"`, `"cuda"`, ...; None: CUDA where there is one, each process of a torchrun
            its own.
        device_map: given to `from_pretrained` instead of moving the model to `device`.
        dtype: `"auto"` is the checkpoint's on a GPU and float32 on a CPU, where bfloat16 is slow.
        extra: more for `from_pretrained` (`revision`, `attn_implementation`, `trust_remote_code`).

    Raises:
        OptionError: no such folder or dtype.
        InputError: the folder or hub id holds no usable model or processor.
    """
    source = _source(pretrained)
    device = device or _default_device()
    on_cpu = (device_map or device) == "cpu"
    chosen = _dtype("float32" if dtype == "auto" and on_cpu else dtype)
    try:
        model, processor = _from_pretrained(source, dtype=chosen, device_map=device_map, **extra)
    except Exception as error:
        # damaged weights, a missing package, an unknown architecture: each has its own class
        first = str(error).strip().partition("\n")[0]
        raise InputError(
            f"pretrained={pretrained!r} could not be loaded as an image-text-to-text model: {first}"
        ) from error
    if not getattr(processor, "chat_template", None):
        raise InputError(
            f"the processor of {pretrained!r} has no chat template, expected one to write prompts "
            f"with; add chat_template.jinja to it"
        )
    processor.tokenizer.padding_side = "left"
    model = model if device_map else model.to(device)
    return Loaded(model.eval(), processor, pretrained)


def _source(pretrained: str) -> str:
    folder = Path(pretrained).expanduser()
    if folder.is_dir():
        return str(folder)
    if pretrained.startswith((".", "/", "~")):
        raise OptionError(f"pretrained={pretrained!r} is not a folder; pass one, or a hub id")
    return pretrained


def _from_pretrained(source: str, **arguments: Any) -> tuple[Any, Any]:
    from transformers import AutoModelForImageTextToText, AutoProcessor

    hub = {key: arguments[key] for key in ("revision", "trust_remote_code") if key in arguments}
    processor = AutoProcessor.from_pretrained(source, **hub)
    return AutoModelForImageTextToText.from_pretrained(source, **arguments), processor


def _default_device() -> str:
    return f"cuda:{os.environ.get('LOCAL_RANK', 0)}" if torch.cuda.is_available() else "cpu"


def _dtype(name: str) -> torch.dtype | str:
    found = getattr(torch, name, None) if name != "auto" else name
    if not (found == "auto" or isinstance(found, torch.dtype)):
        raise OptionError(f"dtype={name!r} is unknown; expected auto, float32, bfloat16 or float16")
    return found
