"""Kernels as Triton's interpreter runs them on the CPU, and memory that is never clean by chance.

Triton reads `TRITON_INTERPRET` when a function is decorated, its own library's functions included,
and its interpreter leaves patches behind: within a module of these tests Triton and `vtc.kernels`
are copies of their own, and no other test sees them.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Iterator
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from torch.overrides import TorchFunctionMode

import vtc

_UNWRITTEN = (
    torch.empty,
    torch.empty_like,
    torch.empty_strided,
    torch.Tensor.new_empty,
    torch.Tensor.new_empty_strided,
)


class Poisoned(TorchFunctionMode):
    """Within it memory that nobody has written to holds NaN, or the lowest integer, or True."""

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        if func not in _UNWRITTEN:
            return out
        if out.is_floating_point():
            return out.fill_(float("nan"))
        return out.fill_(True if out.dtype == torch.bool else torch.iinfo(out.dtype).min)


@pytest.fixture(autouse=True)
def poisoned() -> Iterator[None]:
    """`torch.empty` and the like give poisoned memory: a cell that a kernel left out shows."""
    # the interpreter computes with NumPy, which warns where a GPU gives inf or NaN
    with Poisoned(), np.errstate(all="ignore"):
        yield


@pytest.fixture(scope="module", autouse=True)
def interpreted() -> Iterator[Callable[[str], ModuleType]]:
    """Loads a kernel's module by name; its kernels are interpreted, those of dispatch as well."""
    pytest.importorskip("triton")
    before = {name: module for name, module in sys.modules.items() if _copied(name)}
    package = vars(vtc).get("kernels")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRITON_INTERPRET", "1")
        for name in before:
            del sys.modules[name]
        try:
            yield lambda name: importlib.import_module(f"vtc.kernels.{name}")
        finally:
            for name in [name for name in sys.modules if _copied(name)]:
                del sys.modules[name]
            sys.modules.update(before)
            if package is None:
                vars(vtc).pop("kernels", None)
            else:
                vtc.kernels = package


def _copied(name: str) -> bool:
    # libtriton is compiled code, which a process loads once, and holds no state of a kernel
    in_triton = name.split(".")[0] == "triton" and not name.startswith("triton._C")
    return in_triton or f"{name}.".startswith("vtc.kernels.")
