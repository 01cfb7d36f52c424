"""Models by folder or hub id, with errors that say what is wrong with the name."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch

from vtc.errors import InputError, OptionError, VtcError
from vtc.testbed.model import FAMILIES, model_folder


def quiet() -> None:
    """Keep transformers' warnings off a command's output; its progress bars only for people."""
    from huggingface_hub.utils import logging as hub
    from transformers.utils import logging

    hub.set_verbosity(hub.CRITICAL)
    logging.set_verbosity_error()
    if not sys.stderr.isatty():
        logging.disable_progress_bar()


def name_of(model: str | None) -> str:
    """A name as `from_pretrained` takes it: a folder with a model, or a hub id.

    Args:
        model: the name as given, or a family of the testbed; None: the testbed's first.

    Raises:
        InputError: a folder that does not exist or holds no model.
        VtcError: the testbed's model is not installed.
    """
    if model is None or model in FAMILIES:
        return _testbed(model or FAMILIES[0])
    folder = Path(model).expanduser()
    if folder.is_dir():
        if not (folder / "config.json").is_file():
            raise InputError(
                f"folder {model!r} holds no config.json, expected one written by save_pretrained: "
                f"name the folder of a model"
            )
        return str(folder)
    # a hub id has at most one slash and never starts like a path
    if folder.exists() or model.startswith((".", "/", "~")) or model.count("/") != 1:
        raise InputError(
            f"model {model!r} is not a folder, expected the folder of a model or a hub id such as "
            f"llava-hf/llava-1.5-7b-hf: check the path"
        )
    _look_up(model)
    return model


def device_of(name: str) -> torch.device:
    """The device called `name`; `"auto"` is the GPU if there is one."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.zeros(1, device=device).item()
    except (RuntimeError, AssertionError) as error:
        reason = str(error).partition("\n")[0]
        raise OptionError(
            f"device {name!r} cannot be used here ({reason}), expected 'auto', 'cpu' or a device "
            f"of this machine: see `vtc doctor`"
        ) from None
    return device


def skeleton(model: str) -> Any:
    """The model without weights, from its configuration alone."""
    from transformers import AutoConfig, AutoModelForImageTextToText

    name = name_of(model)
    try:
        config = AutoConfig.from_pretrained(name)
        with torch.device("meta"):
            return AutoModelForImageTextToText.from_config(config)
    except (OSError, ValueError, KeyError, ImportError) as error:
        reason = " ".join(str(error).split())[:200]
        raise InputError(
            f"model {model!r} has no configuration that can be used ({reason}), expected an "
            f"image-text-to-text model of transformers: see `vtc doctor` for those it can be"
        ) from None


def _look_up(model: str) -> None:
    """See that a hub id exists before each of its files is asked for, and waited for, in turn."""
    from huggingface_hub import hf_hub_download

    try:
        hf_hub_download(model, "config.json")
    except (OSError, ValueError) as error:
        reason = str(error).strip().partition("\n")[0]
        raise InputError(
            f"model {model!r} was not found on the hub or in its cache ({reason}), expected one "
            f"such as llava-hf/llava-1.5-7b-hf: check the name, or download it while online"
        ) from None


def _testbed(family: str) -> str:
    folder = model_folder(family)
    if not (folder / "config.json").is_file():
        raise VtcError(
            "the testbed's model is not in this installation, expected it as package data: name a "
            "model with --model"
        )
    return str(folder)
