"""One sample as the language model is fed it, with its images encoded once."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from vtc.adapters.base import Adapter
from vtc.errors import InputError
from vtc.runtime.images import find_images


@dataclass(frozen=True, eq=False)
class Prompt:
    """A prompt of S entries, padding included.

    Attributes:
        adapter: describes the model.
        fed: keyword inputs of its language model.
        visual: `bool[S]`, True on visual tokens (newline tokens are text).
        valid: `bool[S]`, False on padding.
        first: the first entry that is not padding.
        last: the last one, which is text.
    """

    adapter: Adapter
    fed: Mapping[str, Any]
    visual: Tensor
    valid: Tensor
    first: int
    last: int

    def log_probabilities(self) -> Tensor:
        """Run the language model: what may follow the last entry, `float64[V]` on the CPU."""
        states = self.adapter.language_model(**self.fed).last_hidden_state
        logits = self.adapter.model.get_output_embeddings()(states[:, self.last])
        return logits[0].cpu().double().log_softmax(-1)  # type: ignore[no-any-return]


class _Captured(Exception):
    def __init__(self, fed: dict[str, Any]) -> None:
        self.fed = fed


def read_prompt(adapter: Adapter, sample: object) -> Prompt:
    """Encode a sample's images and see where its visual tokens stand.

    Raises:
        InputError: it is no processor output of one prompt with images that ends with text.
    """
    inputs = _placed(adapter, _checked(adapter, sample))
    ids = inputs["input_ids"]
    video = adapter.video_token_id
    images = find_images(
        adapter, inputs, ids == adapter.image_token_id, None if video is None else ids == video
    )
    visual = torch.zeros(ids.shape[1], dtype=torch.bool)
    visual[images.columns[images.valid]] = True
    mask = inputs.get("attention_mask")
    valid = torch.ones_like(visual) if mask is None else mask[0].bool().cpu()
    entries = valid.nonzero()[:, 0].tolist()
    if not entries or visual[entries[-1]]:
        raise InputError(
            "the prompt ends with an image, expected text behind it: what the model makes of an "
            "image is measured at the last token of text"
        )
    fed = _capture(adapter, inputs) | {"use_cache": False, "past_key_values": None}
    return Prompt(adapter, fed, visual, valid, entries[0], entries[-1])


def _checked(adapter: Adapter, sample: object) -> Mapping[str, Any]:
    fix = "pass what the model's processor returns for one prompt"
    if not isinstance(sample, Mapping):
        raise InputError(f"it is a {type(sample).__name__}, expected a mapping: {fix}")
    ids = sample.get("input_ids")
    if not isinstance(ids, Tensor) or ids.dim() != 2 or len(ids) != 1:
        got = tuple(ids.shape) if isinstance(ids, Tensor) else type(ids).__name__
        raise InputError(f"input_ids are {got}, expected a tensor (1, entries): {fix}")
    if not adapter.has_images(sample):
        raise InputError(f"it has no images ({adapter.pixel_inputs[0]}), expected some: {fix}")
    return sample


def _placed(adapter: Adapter, sample: Mapping[str, Any]) -> dict[str, Any]:
    """The inputs on the model's device, pixels in its precision."""
    device = adapter.model.device
    # weights that are fetched when they are used have no device of their own
    moved = {
        name: x.to(device) if isinstance(x, Tensor) and device.type != "meta" else x
        for name, x in sample.items()
    }
    for name in adapter.pixel_inputs:
        if isinstance(pixels := moved.get(name), Tensor):
            moved[name] = pixels.to(adapter.model.dtype)
    return moved


def _capture(adapter: Adapter, inputs: Mapping[str, Any]) -> dict[str, Any]:
    """What the base model would feed its language model, which is not run."""

    def stop(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        raise _Captured(kwargs)

    base: Any = adapter.base
    names = inspect.signature(base.forward).parameters
    given = {k: v for k, v in inputs.items() if k in names and v is not None}
    # families with multi-axis positions keep those of the last prompt for its next tokens
    kept = {name: vars(base)[name] for name in ("rope_deltas",) if name in vars(base)}
    hook = adapter.language_model.register_forward_pre_hook(stop, with_kwargs=True, prepend=True)
    try:
        base(**given)
    except _Captured as captured:
        return captured.fed
    finally:
        hook.remove()
        vars(base).update(kept)
    raise InputError("the model never called its language model; expected a stock forward")
