"""Calls of fixed shape, captured once and replayed: CUDA graphs without launch overhead.

`Graphs` holds a bounded number of them. Its eager backend runs the same code, static buffers and
all, without a GPU.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Hashable
from dataclasses import dataclass, field
from functools import partial
from itertools import accumulate
from typing import Any, Literal

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from vtc.dispatch import holding

_FAILED = 1024  # keys of which it is remembered why they cannot be captured
_SMALL = 2**16  # bytes of a tensor that is handed out together with others

Backend = Literal["cuda", "eager"]
Function = Callable[..., Any]


@dataclass
class _Captured:
    """One call.

    Attributes:
        inputs: static buffers that arguments are copied into.
        replay: runs it on them.
        leaves: the tensors and other leaves it left, of the tree `structure`.
        constants: what it reads besides: a graph holds nothing that is not of its own memory.
    """

    inputs: list[Tensor]
    replay: Callable[[], None]
    leaves: list[Any]
    structure: Any
    constants: list[Tensor] = field(default_factory=list)

    def output(self) -> Any:
        """What it left, copied: another replay may write where it stands."""
        copies = [x.clone() if isinstance(x, Tensor) else x for x in self.leaves]
        return _apart(*pytree.tree_unflatten(copies, self.structure))


class Graphs:
    """The captured calls of one model, the least recently used dropped first.

    Args:
        device: where they run.
        backend: `"cuda"` captures; `"eager"` calls the function on the static buffers each time.
        limit: how many are held. All are dropped when they take an eighth of the device's memory.
    """

    def __init__(self, device: torch.device, backend: Backend, limit: int = 32) -> None:
        self.device, self.backend, self.limit = device, backend, limit
        self._held: OrderedDict[Hashable, _Captured] = OrderedDict()
        self._failed: dict[Hashable, str] = {}
        self._pool: Any = None
        self._seen: OrderedDict[Hashable, None] = OrderedDict()
        # whether what runs now will be replayed
        self.capturing = backend == "eager"
        self.captures, self.warm_runs = 0, 1
        self.most = 2**63
        if device.type == "cuda":
            self.most = torch.cuda.get_device_properties(device).total_memory // 8
        self.bytes = 0

    def __len__(self) -> int:
        return len(self._held)

    def said(self, key: Hashable) -> str:
        """How a call of this key was run last: the backend, or that it is new."""
        return self.backend if key in self._held else "captured when its size comes again"

    def holds(self, key: Hashable) -> bool:
        """Whether a call is held."""
        return key in self._held

    def clear(self) -> None:
        """Drop all, with their memory."""
        self._held.clear()
        self._failed.clear()
        self._pool, self.bytes = None, 0

    def forget(self, table: dict[Any, Any]) -> None:
        """Drop what a table remembers of calls that are no longer held, once it is long."""
        if len(table) > 2 * self.limit:
            for key in [key for key in table if key not in self._held]:
                del table[key]

    def drop(self, wanted: Callable[[Hashable], bool]) -> None:
        """Drop those whose key is wanted."""
        for key in [key for key in self._held if wanted(key)]:
            del self._held[key]

    def run(
        self,
        key: Hashable,
        function: Function,
        inputs: list[Tensor],
        patient: bool = False,
    ) -> Any:
        """`function(*inputs)`, captured and from then on replayed.

        Args:
            key: everything that decides what the function does, but the numbers in `inputs`.
            function: does the same when it is run again; must not look at numbers on the device.
            inputs: tensors, of the shapes and types that the key stands for; one shorter than its
                buffer in the last dimension is padded with zeros.
            patient: capture only what comes a second time: where pictures differ in size in every
                call, captures would cost more than they save.

        Raises:
            CaptureError: it cannot be captured; nothing is held.
        """
        captured = self._held.get(key)
        if captured is None and patient and key not in self._failed and not self._known(key):
            return function(*inputs)
        if captured is None:
            captured = self._capture(key, partial(_together, function), inputs)
        else:
            self._held.move_to_end(key)
            for buffer, given in zip(captured.inputs, inputs, strict=True):
                _fill(buffer, given)
        captured.replay()
        return captured.output()

    def _known(self, key: Hashable) -> bool:
        """Whether a key came before; from now on it has."""
        known = key in self._seen
        self._seen[key] = None
        self._seen.move_to_end(key)
        # what comes again only after so many others would be dropped before it is of use
        while len(self._seen) > 3 * self.limit // 4:
            self._seen.popitem(last=False)
        return known

    def _capture(
        self,
        key: Hashable,
        function: Function,
        inputs: list[Tensor],
    ) -> _Captured:
        if (reason := self._failed.get(key)) is not None:
            raise CaptureError(reason)
        if self.bytes > self.most:
            self.clear()
        while len(self._held) >= self.limit:
            self._held.popitem(last=False)
        # what one call makes under inference_mode, another could not write to
        constants: list[Tensor] = []
        with torch.inference_mode(False), torch.no_grad(), holding(constants):
            buffers = [x.clone(memory_format=torch.contiguous_format) for x in inputs]
            if self.backend == "eager":
                captured = _eager(function, buffers)
            else:
                try:
                    self.capturing = True
                    captured = self._on_cuda(function, buffers)
                except torch.OutOfMemoryError as error:  # there may be more the next time
                    raise CaptureError("there is no memory to capture it") from error
                except RuntimeError as error:
                    reason = str(error).strip().split("\n")[0]
                    if len(self._failed) >= _FAILED:
                        self._failed.clear()
                    self._failed[key] = f"it cannot be captured: {reason}"
                    raise CaptureError(self._failed[key]) from error
                finally:
                    self.capturing = False
        captured.constants = constants
        self.captures += 1
        self._held[key] = captured
        return captured

    def _on_cuda(self, function: Function, buffers: list[Tensor]) -> _Captured:
        if self._pool is None:
            self._pool = torch.cuda.graph_pool_handle()
        reserved = torch.cuda.memory_reserved(self.device)
        stream, current = torch.cuda.Stream(self.device), torch.cuda.current_stream(self.device)
        stream.wait_stream(current)
        with torch.cuda.stream(stream):
            # what is made on first use (kernels, tables, workspaces) cannot be made in a capture
            for _ in range(self.warm_runs):
                function(*buffers)
        current.wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(
            graph, pool=self._pool, stream=stream, capture_error_mode="thread_local"
        ):
            output = function(*buffers)
        leaves, structure = pytree.tree_flatten(output)
        self.bytes += max(0, torch.cuda.memory_reserved(self.device) - reserved)
        return _Captured(buffers, graph.replay, leaves, structure)


# first byte and end, type and shape
_Place = tuple[int, int, torch.dtype, torch.Size]


@dataclass(frozen=True)
class _Places:
    """Where the leaves of the tree `structure` stand among the bytes of one tensor; None: it is by
    itself."""

    where: tuple[_Place | None, ...]
    structure: Any


class CaptureError(RuntimeError):
    """A call looks at the device, or does something else that no graph can hold."""


def _together(function: Function, *inputs: Tensor) -> tuple[Tensor | None, list[Any], Any]:
    """What a function gives for `_apart`: its small tensors as the bytes of one, since each copy is
    a launch; all other leaves; and where each stands."""
    leaves, structure = pytree.tree_flatten(function(*inputs))
    small = {id(x): x for x in leaves if _is_small(x) and x.device == inputs[0].device}
    if len(small) < 2:
        return None, leaves, _Places((None,) * len(leaves), structure)
    # the largest items first: all stand at multiples of their size
    order = sorted(small.values(), key=lambda x: -x.itemsize)
    ends = accumulate(x.nbytes for x in order)
    places = {id(x): (end - x.nbytes, end, x.dtype, x.shape) for x, end in zip(order, ends)}  # noqa: B905
    joined = torch.cat([x.contiguous().view(-1).view(torch.uint8) for x in order])
    others = [None if id(x) in places else x for x in leaves]
    return joined, others, _Places(tuple(places.get(id(x)) for x in leaves), structure)


def _is_small(x: Any) -> bool:
    return isinstance(x, Tensor) and x.nbytes <= _SMALL


def _apart(joined: Tensor | None, others: list[Any], places: _Places) -> Any:
    """What the function gave."""

    def leaf(other: Any, place: _Place | None) -> Any:
        if place is None or joined is None:
            return other
        start, end, dtype, shape = place
        return joined[start:end].view(dtype).view(shape)

    return pytree.tree_unflatten(map(leaf, others, places.where), places.structure)


def _eager(function: Function, buffers: list[Tensor]) -> _Captured:
    captured = _Captured(buffers, lambda: None, [], None)

    @torch.inference_mode(False)
    @torch.no_grad()
    def replay() -> None:
        captured.leaves, captured.structure = pytree.tree_flatten(function(*buffers))

    captured.replay = replay
    return captured


def _fill(buffer: Tensor, given: Tensor) -> None:
    """Copy into a buffer that may be longer in its last dimension."""
    if buffer.shape == given.shape:
        buffer.copy_(given)
        return
    length = given.shape[-1]
    buffer[..., :length].copy_(given)
    buffer[..., length:].zero_()
