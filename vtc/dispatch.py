"""Which implementation of a tensor operation runs: plain torch or the Triton kernel equal to it.

An operation is written once, in plain torch, in `vtc.ops`. `accelerated` lets the kernel of the
same name in `vtc.kernels` take its place where it applies.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, ParamSpec, TypeVar

import torch
from torch import Tensor

from vtc.errors import OptionError

KERNELS = ("auto", "torch", "triton")

P = ParamSpec("P")
R = TypeVar("R")

_mode: ContextVar[str] = ContextVar("vtc_kernels", default="auto")
_held: ContextVar[list[Tensor] | None] = ContextVar("vtc_constants", default=None)
_ran: ContextVar[dict[str, str] | None] = ContextVar("vtc_kernels_ran", default=None)


def checked(kernels: str, device: torch.device) -> str:
    """`kernels` as given, if it can be had on a device.

    Raises:
        OptionError: it is unknown, or Triton was asked for where no kernel can run.
    """
    if not isinstance(kernels, str) or kernels not in KERNELS:
        raise OptionError(f"kernels={kernels!r} is unknown; expected one of {', '.join(KERNELS)}")
    if kernels == "triton":
        if not _installed():
            raise OptionError(
                "kernels='triton' was asked for and Triton is not installed; install triton, or "
                "pass kernels='auto'"
            )
        if device.type != "cuda" and not interpreted():
            raise OptionError(
                f"kernels='triton' was asked for on {device.type}, expected a CUDA device; move "
                "the model there, pass kernels='auto', or set TRITON_INTERPRET=1 to have kernels "
                "interpreted"
            )
    return kernels


@contextmanager
def using(kernels: str, ran: dict[str, str] | None = None) -> Iterator[None]:
    """Within it, operations run as `kernels` says; `ran` is told which implementation each took."""
    before, told = _mode.set(kernels), _ran.set(ran)
    try:
        yield
    finally:
        _ran.reset(told)
        _mode.reset(before)


def interpreted() -> bool:
    """Whether Triton's kernels are run by its interpreter, on any device."""
    return os.environ.get("TRITON_INTERPRET") == "1" and _installed()


def accelerated(operation: Callable[P, R]) -> Callable[P, R]:
    """Let the kernel `vtc.kernels.<name>.<name>`, with the same arguments, take the place of an
    operation.

    It does on CUDA unless `kernels="torch"`, a gradient is wanted, or its module's
    `refusal(*args)` gives a reason. `operation.reference` is plain torch whatever is chosen.
    """
    name = operation.__name__

    @functools.wraps(operation)
    def chosen(*args: P.args, **kwargs: P.kwargs) -> R:
        kernel = _kernel(name, args, kwargs)
        if (ran := _ran.get()) is not None:
            ran[name] = "torch" if kernel is None else "triton"
        return operation(*args, **kwargs) if kernel is None else kernel(*args, **kwargs)

    chosen.reference = operation  # type: ignore[attr-defined]
    return chosen


def _kernel(name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Callable[..., Any] | None:
    mode = _mode.get()
    tensors = [x for x in (*args, *kwargs.values()) if isinstance(x, Tensor)]
    cuda = any(x.is_cuda for x in tensors)
    if mode == "torch" or not (cuda or (mode == "triton" and interpreted())) or not _installed():
        return None
    if torch.is_grad_enabled() and any(x.requires_grad for x in tensors):
        return None
    if torch.compiler.is_compiling():
        return None
    module = importlib.import_module(f"vtc.kernels.{name}")
    reason = module.refusal(*args, **kwargs)
    if reason is not None:
        if mode == "triton":
            raise OptionError(
                f"kernels='triton' was asked for, but {name} has no kernel for {reason}; pass "
                "kernels='auto'"
            )
        return None
    return getattr(module, name)  # type: ignore[no-any-return]


@functools.cache
def _installed() -> bool:
    return importlib.util.find_spec("triton") is not None


def constant(values: Tensor | tuple[int, ...], device: torch.device) -> Tensor:
    """Whole numbers known on the host, of any shape, as a tensor on a device, copied there once.

    A copy waits for all that the device was told before, and cannot be captured in a CUDA graph.
    """
    # what one call makes under inference_mode, another could not save for a backward pass
    with torch.inference_mode(False):
        given = torch.tensor(values) if isinstance(values, tuple) else values.detach().cpu().clone()
        given = given.long() if isinstance(values, tuple) else given.contiguous()
        dtype = str(given.dtype).removeprefix("torch.")
        found = _constant(given.numpy().tobytes(), dtype, tuple(given.shape), device)
    if (held := _held.get()) is not None:
        held.append(found)
    return found


@contextmanager
def holding(constants: list[Tensor]) -> Iterator[None]:
    """Within it, all that `constant` gives is held by `constants` too: what is captured reads them
    for as long as it is replayed."""
    before = _held.set(constants)
    try:
        yield
    finally:
        _held.reset(before)


@functools.lru_cache(maxsize=1024)
def _constant(data: bytes, dtype: str, shape: tuple[int, ...], device: torch.device) -> Tensor:
    flat = torch.frombuffer(bytearray(data), dtype=getattr(torch, dtype)) if data else None
    empty = torch.empty(0, dtype=getattr(torch, dtype))
    return (empty if flat is None else flat).view(shape).to(device, copy=True)
