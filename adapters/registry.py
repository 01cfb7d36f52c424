"""From a model to the adapter that describes it."""

from __future__ import annotations

from vtc.adapters.base import Adapter
from vtc.adapters.internvl import InternVLAdapter
from vtc.adapters.llava import LlavaAdapter, LlavaNextAdapter, LlavaOnevisionAdapter
from vtc.adapters.qwen_vl import Qwen2VLAdapter, Qwen3VLAdapter, Qwen25VLAdapter
from vtc.errors import UnsupportedModelError

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


def adapter_of(model: object) -> Adapter:
    """The adapter of a stock transformers model.

    Raises:
        UnsupportedModelError: the class is not described by any adapter; names those that are.
    """
    from transformers import GenerationMixin, PreTrainedModel

    if isinstance(model, PreTrainedModel) and isinstance(model, GenerationMixin):
        for adapter in ADAPTERS:
            if model.config.model_type in adapter.model_types:
                return adapter(model)
    raise UnsupportedModelError(
        f"cannot patch a {type(model).__name__}; expected a stock transformers model of one of "
        f"these classes: {'; '.join(supported_models())}"
    )
