"""Two accelerators that do not exist: tensors on them refuse to meet one another, as on real ones.

Their numbers are computed on the CPU. A forgotten `.to(device)` raises here as it would on CUDA.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map

# a kind of device whose guard torch ships, though nothing in transformers asks for it
FIRST, SECOND = torch.device("lazy:0"), torch.device("lazy:1")

_COPIES = {
    torch.ops.aten._to_copy.default,
    torch.ops.aten.copy_.default,
    torch.ops.aten._local_scalar_dense.default,
}
# as on CUDA, what is indexed may lie elsewhere than its indices, if those are on the CPU
_INDEXING = {
    torch.ops.aten.index.Tensor,
    torch.ops.aten.index_put.default,
    torch.ops.aten.index_put_.default,
    torch.ops.aten._index_put_impl_.default,
}


class _There(Tensor):
    """A tensor that says it is on a device and holds its numbers on the CPU."""

    held: Tensor

    @staticmethod
    def __new__(cls, held: Tensor, device: torch.device) -> _There:
        made = torch.Tensor._make_wrapper_subclass(
            cls,
            held.size(),
            strides=held.stride(),
            storage_offset=held.storage_offset(),
            dtype=held.dtype,
            device=device,
            requires_grad=held.requires_grad,
        )
        made.held = held
        return made

    @classmethod
    def __torch_dispatch__(
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        return _run(func, args, kwargs or {})

    def tolist(self) -> Any:
        return self.held.tolist()


class _Devices(TorchDispatchMode):
    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        return _run(func, args, kwargs or {})


class _Literals(TorchFunctionMode):
    """Numbers of Python become tensors below the reach of a dispatch mode."""

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = dict(kwargs or {})
        if func in (torch.tensor, torch.as_tensor) and kwargs.get("device") is not None:
            device = kwargs.pop("device")
            data = args[0]
            if isinstance(data, list):
                data = tree_map(lambda x: x.item() if isinstance(x, _There) else x, data)
            return func(data, *args[1:], **kwargs).to(device)
        return func(*args, **kwargs)


def _check(func: Any, args: tuple[Any, ...], tensors: list[Tensor]) -> torch.device:
    """The device that an operation on these runs on."""
    if func in _INDEXING:
        source, values = args[0], [x for x in args[2:3] if isinstance(x, Tensor) and x.dim()]
        where = {x.device for x in (source, *values)}
        where |= {x.device for x in args[1] if x is not None and x.device.type != "cpu"}
    else:
        where = {x.device for x in tensors if x.dim()} or {x.device for x in tensors}
    if len(where) > 1:
        raise RuntimeError(f"Expected all tensors to be on the same device, found {where} ({func})")
    return where.pop()


def _run(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    tensors = [x for x in tree_flatten((args, kwargs))[0] if isinstance(x, Tensor)]
    device = kwargs.get("device")
    if func in _COPIES:
        device = device or args[0].device
    elif tensors:
        device = device or _check(func, args, tensors)
    device = torch.device("cpu") if device is None else torch.device(device)
    if kwargs.get("device") is not None:
        kwargs = {**kwargs, "device": torch.device("cpu")}
    made = func(*tree_map(_held, args), **tree_map(_held, kwargs))
    # what is changed in place is returned as the very tensor that was given
    known = {id(x.held): x for x in tensors if isinstance(x, _There)}

    def there(x: Any) -> Any:
        if not isinstance(x, Tensor) or device.type == "cpu":
            return x
        return known[id(x)] if id(x) in known else _There(x, device)

    return tree_map(there, made)


def _held(x: Any) -> Any:
    return x.held if isinstance(x, _There) else x


@contextmanager
def two_devices() -> Iterator[tuple[torch.device, torch.device]]:
    """Within it there are two devices besides the CPU."""
    with _Devices(), _Literals():
        yield FIRST, SECOND
