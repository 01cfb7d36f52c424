"""Replays as a CUDA graph does them, on the CPU: what ran once is recorded, operation by operation,
and run again on the static buffers; no Python of the captured function runs a second time."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from vtc.runtime import graphs


class _Recorder(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.operations: list[tuple[Any, Any, Any, Any]] = []
        self._memory: dict[int, Tensor] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        args, kwargs = (
            pytree.tree_map(self._where, args),
            pytree.tree_map(self._where, kwargs or {}),
        )
        self.operations.append((func, args, kwargs, out))
        return out

    def _where(self, x: Any) -> Any:
        """Weights by their memory: a graph does not know whose it is."""
        if not isinstance(x, nn.Parameter):
            return x
        return self._memory.setdefault(id(x), x.detach())


def _frozen(function: graphs.Function, buffers: list[Tensor]) -> graphs._Captured:
    recorder = _Recorder()
    function(*buffers)
    with recorder:
        out = function(*buffers)
    leaves, structure = pytree.tree_flatten(out)

    @torch.inference_mode(False)
    @torch.no_grad()
    def replay() -> None:
        now: dict[int, Tensor] = {}

        def current(x: Any) -> Any:
            return now.get(id(x), x) if isinstance(x, Tensor) else x

        for func, args, kwargs, before in recorder.operations:
            if func is torch.ops.aten.lift_fresh.default:
                continue
            args, kwargs = pytree.tree_map(current, args), pytree.tree_map(current, kwargs)
            pairs = zip(
                pytree.tree_leaves(before), pytree.tree_leaves(func(*args, **kwargs)), strict=True
            )
            now |= {id(old): new for old, new in pairs if isinstance(old, Tensor)}
        captured.leaves = [current(x) for x in leaves]

    captured = graphs._Captured(buffers, replay, list(leaves), structure)
    return captured


@contextmanager
def frozen() -> Iterator[None]:
    """Within it, the eager backend of captured calls replays what it recorded."""
    before = graphs._eager
    graphs._eager = _frozen
    try:
        yield
    finally:
        graphs._eager = before
