"""Feed-forward networks of a width that matrix products are slow at, run at the next good one.

A width of 3,420 (Qwen2.5-VL's encoder) makes rows that do not begin at 16 bytes, for which the
libraries fall back to slow kernels. Rows and columns of zeros change nothing.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

from torch import nn
from torch.nn import functional as F

_BYTES = 16  # what rows should begin at a multiple of
_INTO, _OUT = ("gate_proj", "up_proj"), "down_proj"


class Aligned:
    """Wider copies of the gated feed-forward networks of some blocks, made when they are used.

    What a gate of zeros lets through of zeros is zero, so that only networks with a gate are
    widened, whatever their activation.
    """

    def __init__(self) -> None:
        self._copies: dict[nn.Module, list[tuple[nn.Module, str, nn.Parameter]]] = {}
        # what was copied, and how often it had been written to
        self._sources: list[tuple[nn.Parameter, int]] = []

    def clear(self) -> None:
        """Forget the copies."""
        self._copies.clear()
        self._sources.clear()

    @property
    def stale(self) -> bool:
        """Whether weights were written to since they were copied. Nobody knows of `.data`."""
        return any(weight._version != version for weight, version in self._sources)

    @property
    def held_bytes(self) -> int:
        """Memory of the copies."""
        return sum(wide.nbytes for copies in self._copies.values() for *_, wide in copies)

    @contextmanager
    def within(self, blocks: tuple[nn.Module, ...]) -> Iterator[None]:
        """Within it, blocks run on the copies."""
        with ExitStack() as stack:
            for block in blocks:
                for module in block.modules():
                    if not _misaligned(module):
                        continue
                    if module not in self._copies:
                        self._copies[module] = _widened(module)
                        self._sources += [(w, w._version) for w in module.parameters()]
                    for linear, name, wide in self._copies[module]:
                        stack.callback(
                            linear._parameters.__setitem__, name, linear._parameters[name]
                        )
                        linear._parameters[name] = wide
            yield


def _misaligned(module: Any) -> bool:
    parts: list[Any] = [getattr(module, name, None) for name in (*_INTO, _OUT)]
    if not all(type(part) is nn.Linear for part in parts):
        return False
    weight = parts[0].weight
    return bool(len(weight) * weight.element_size() % _BYTES)


def _widened(module: Any) -> list[tuple[nn.Module, str, nn.Parameter]]:
    weight = module.gate_proj.weight
    more = -len(weight) % (_BYTES // weight.element_size())
    found = []
    for name in (*_INTO, _OUT):
        linear = getattr(module, name)
        pad = (0, more) if name == _OUT else (0, 0, 0, more)
        copies = {"weight": F.pad(linear.weight.detach(), pad)}
        if name != _OUT and linear.bias is not None:
            copies["bias"] = F.pad(linear.bias.detach(), (0, more))
        found += [
            (linear, key, nn.Parameter(wide, requires_grad=False)) for key, wide in copies.items()
        ]
    return found
