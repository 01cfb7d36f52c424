"""Times of a prefill, and of all up to the first logits."""

from __future__ import annotations

from collections.abc import Callable
from types import TracebackType
from typing import Any

import torch
from torch import nn

from vtc.adapters.registry import adapter_of
from vtc.runtime.clock import Clock


class Stopwatch:
    """Hooks on a stock model, the same whether it is patched later or not. A context manager.

    The prefill begins where the language model is called, before any hook of a patch, and ends
    behind the head's logits. There the device is waited for, so that what was queued before is not
    counted; stock has waited for the vision tower by then, to compare its number of features with
    that of the placeholders.
    """

    def __init__(self, model: Any) -> None:
        self._model, self._device = model, model.device
        self._clock = Clock(self._device)
        self._hooks: list[Any] = []

    def __enter__(self) -> Stopwatch:
        language, head = adapter_of(self._model).language_model, self._model.get_output_embeddings()
        self._hooks = [
            language.register_forward_pre_hook(self._enter),
            head.register_forward_hook(self._leave),
        ]
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        while self._hooks:
            self._hooks.pop().remove()

    def __call__(self, call: Callable[[], Any]) -> tuple[float, float]:
        """Milliseconds of the prefill, and from the call to the first logits."""
        self._wait()
        self._clock = Clock(self._device)
        self._clock.mark("call")
        call()
        self._wait()
        prefill = self._clock.ms("embeddings", "logits")
        whole = self._clock.ms("call", "logits")
        if prefill is None or whole is None:
            raise RuntimeError("the call ran no prefill, expected one that makes logits")
        return prefill, whole

    def _enter(self, module: nn.Module, args: Any) -> None:
        self._wait()
        self._clock.mark("embeddings")

    def _leave(self, module: nn.Module, args: Any, output: Any) -> None:
        self._clock.mark("logits")

    def _wait(self) -> None:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
