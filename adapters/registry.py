"""From a model to the adapter that describes it."""

from __future__ import annotations

import sys
from typing import Any

from vtc.adapters.base import Adapter
from vtc.adapters.internvl import InternVLAdapter
from vtc.adapters.llava import LlavaAdapter, LlavaNextAdapter, LlavaOnevisionAdapter
from vtc.adapters.qwen_vl import Qwen2VLAdapter, Qwen3VLAdapter, Qwen25VLAdapter
from vtc.errors import UnsupportedModeError, UnsupportedModelError

ADAPTERS: tuple[type[Adapter], ...] = (
    LlavaAdapter,
    LlavaNextAdapter,
    LlavaOnevisionAdapter,
    Qwen2VLAdapter,
    Qwen25VLAdapter,
    Qwen3VLAdapter,
    InternVLAdapter,
)


def supported_models() -> list[str]:
    """The model classes that can be patched."""
    return [adapter.supported for adapter in ADAPTERS]


def stock_of(model: object) -> object:
    """The transformers model inside a PEFT model; what is no PEFT model is returned as it is."""
    peft: Any = sys.modules.get("peft")
    if peft is None or not isinstance(model, peft.PeftModel | peft.PeftMixedModel):
        return model
    return model.get_base_model()


def _check_adapters(model: Any) -> None:
    """Refuse PEFT adapters that put virtual tokens in front of a prompt."""
    for name, config in model.peft_config.items():
        if config.is_prompt_learning:
            raise UnsupportedModeError(
                f"PEFT adapter {name!r} is of type {config.peft_type.value}, expected one that "
                "changes weights, such as LoRA: virtual tokens in front of a prompt are not among "
                "the ids by which images are found"
            )


def adapter_of(model: object) -> Adapter:
    """The adapter of a stock transformers model, also of one that PEFT wrapped.

    Raises:
        UnsupportedModelError: the class is not described by any adapter; names those that are.
        UnsupportedModeError: it is, but wrapped in a way in which it cannot be patched.
    """
    from transformers import GenerationMixin, PreTrainedModel

    stock = stock_of(model)
    if stock is not model:
        _check_adapters(model)
    if isinstance(stock, PreTrainedModel) and isinstance(stock, GenerationMixin):
        for adapter in ADAPTERS:
            if stock.config.model_type in adapter.model_types:
                return adapter(stock)
    # torch.compile, and DataParallel with its kin
    for name in ("_orig_mod", "module"):
        if isinstance(getattr(model, name, None), PreTrainedModel):
            raise UnsupportedModelError(
                f"cannot patch a {type(model).__name__} around a model, expected the model inside: "
                f"call vtc.patch(model.{name}, ...) and go on using the wrapper"
            )
    raise UnsupportedModelError(
        f"cannot patch a {type(stock).__name__}; expected a stock transformers model of one of "
        f"these classes: {'; '.join(supported_models())}"
    )
