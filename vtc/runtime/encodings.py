"""What the encoder gave for inputs that it was given before, for a caller who asks many methods the
same questions."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

# by block and kind, a tensor for each run of the tower, see `EncoderSignals`
Found = dict[tuple[int, str], list[Tensor]]


@dataclass(frozen=True, eq=False)
class Encoding:
    """What one call's inputs come to before the language model.

    Attributes:
        kwargs: what the stock base model feeds its language model.
        found: what was read off the encoder on the way, for one method or several.
    """

    kwargs: dict[str, Any]
    found: Found


class Encodings:
    """Encodings of one model by the bits of a call's inputs.

    The model must stay as it is, and so must what is handed out. When the limit is reached, what is
    there stays and no more is added, so that asking for everything in turn finds some of it.

    Args:
        limit: bytes that are held at most.

    Attributes:
        bytes: that are held.
    """

    def __init__(self, limit: int) -> None:
        self.limit, self.bytes = limit, 0
        self._held: dict[bytes, Encoding] = {}

    def find(self, key: bytes | None, needed: set[tuple[int, str]]) -> Encoding | None:
        """What inputs came to, by their `digest`, if all that is needed was read off then."""
        held = None if key is None else self._held.get(key)
        return held if held is not None and needed <= held.found.keys() else None

    def add(self, key: bytes | None, kwargs: dict[str, Any], found: Found) -> None:
        """Hold what inputs came to; behind an earlier call with them, what was read off since."""
        if key is None or not all(_is_plain(value) for value in kwargs.values()):
            return
        held = self._held.get(key)
        if held is None:
            new, held = [kwargs, found], Encoding(dict(kwargs), {})
        else:
            found = {name: read for name, read in found.items() if name not in held.found}
            new = [found]
        if self.bytes + (size := _bytes(new)) > self.limit:
            return
        self._held[key] = held
        # the caller's own lists are cleared before its next call
        held.found.update({name: list(read) for name, read in found.items()})
        self.bytes += size


def _is_plain(value: Any) -> bool:
    """Whether a value cannot be changed by a language model that is given it, as a cache is."""
    if isinstance(value, (list, tuple)):
        return all(_is_plain(part) for part in value)
    return value is None or isinstance(value, (Tensor, bool, int, float, str))


def digest(inputs: Mapping[str, Any]) -> bytes | None:
    """A number for the bits of all inputs; None: there is more among them than tensors."""
    found = hashlib.blake2b(digest_size=16)
    for name in sorted(inputs):
        if (value := inputs[name]) is None:
            continue
        if not _is_plain(value) or isinstance(value, (list, tuple)):
            return None
        found.update(f"{name}:".encode())
        if isinstance(value, Tensor):
            found.update(f"{value.dtype}{tuple(value.shape)}".encode())
            flat = value.detach().contiguous().cpu().flatten().view(torch.uint8)
            found.update(flat.numpy().data)
        else:
            found.update(repr(value).encode())
    return found.digest()


def _bytes(value: Any) -> int:
    if isinstance(value, Tensor):
        return value.numel() * value.element_size()
    if isinstance(value, Mapping):
        return sum(map(_bytes, value.values()))
    return sum(map(_bytes, value)) if isinstance(value, (list, tuple)) else 0
