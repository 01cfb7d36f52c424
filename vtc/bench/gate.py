"""Before anything is timed: the fast path against the eager one, on copies with few layers.

The first logits of the same provider. In bfloat16 their error against the eager path in float32 may
be at most twice that of the eager path in bfloat16. In float32 the same tokens must be chosen, and
the error may be 2⁻⁸ of that of bfloat16: float32 rounds 2¹⁶ times finer, and half of those bits are
left for sums in another order. The eager path against plain torch is what the tests check.
"""

from __future__ import annotations

import copy
import gc
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from torch import Tensor

from vtc.bench.providers import Provider
from vtc.bench.rows import Row
from vtc.bench.shapes import Inputs, Shape, build, sharpen

LAYERS = 4

Models = Mapping[torch.dtype, Any]


@dataclass(frozen=True)
class Parity:
    """Largest errors of the logits against the eager path in float32, and what they may be.

    Attributes:
        error_bf16: of the fast path in bfloat16.
        limit_bf16: twice that of the eager path.
        error_fp32: of the fast path in float32.
        limit_fp32: what it may be.
        same_tokens: whether both paths choose the same tokens in float32.
    """

    error_bf16: float
    limit_bf16: float
    error_fp32: float
    limit_fp32: float
    same_tokens: bool

    @property
    def green(self) -> bool:
        """Whether both are small enough; a NaN is not."""
        small = self.error_bf16 <= self.limit_bf16 and self.error_fp32 <= self.limit_fp32
        return small and self.same_tokens

    def to_dict(self) -> dict[str, Any]:
        """For a row."""
        return asdict(self)


class Gate:
    """The checks of one shape; what was checked once is remembered. A context manager, which drops
    its models.

    Args:
        shape: the model.
        device: where it runs.
    """

    def __init__(self, shape: Shape, device: str) -> None:
        low = build(shape, device, torch.bfloat16, min(LAYERS, shape.decoder.layers))
        sharpen(low)
        self.shape = shape
        self.models: dict[torch.dtype, Any] = {torch.bfloat16: low}
        self.models[torch.float32] = copy.deepcopy(low).float()
        self._known: dict[tuple[str, str, int, int], Parity] = {}

    def __enter__(self) -> Gate:
        return self

    def __exit__(self, *_: object) -> None:
        self.models.clear()
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()

    def __call__(self, provider: Provider, batch: int = 1, images: int = 1) -> Parity | None:
        """Of a provider that is not eager; None for an eager one.

        Raises:
            VtcError: it cannot run.
        """
        if provider.path == "eager":
            return None
        at = provider.method, provider.path, batch, images
        if at not in self._known:
            like = torch.empty(0, dtype=torch.bfloat16, device=next(self._devices()))
            inputs = self.shape.inputs(batch, like, images)
            self._known[at] = parity(self.models, provider, inputs)
        return self._known[at]

    def checked(self, provider: Provider, batch: int = 1, images: int = 1) -> Row:
        """The same as part of a row, for `attempt`."""
        return {"parity": self(provider, batch, images)}

    def _devices(self) -> Any:
        return (model.device for model in self.models.values())


def parity(models: Models, provider: Provider, inputs: Inputs) -> Parity:
    """Of one fast provider, on the same weights in both dtypes."""
    with _without_tf32():
        return _parity(models, provider, inputs)


def _parity(models: Models, provider: Provider, inputs: Inputs) -> Parity:
    eager = replace(provider, path="eager")
    low, full = models[torch.bfloat16], models[torch.float32]
    whole = {k: v.float() if v.is_floating_point() else v for k, v in inputs.items()}
    exact, tokens = first_logits(full, eager, whole)
    rounding = _error(first_logits(low, eager, inputs)[0], exact)
    fast, fast_tokens = first_logits(full, provider, whole)
    return Parity(
        error_bf16=_error(first_logits(low, provider, inputs)[0], exact),
        limit_bf16=2 * rounding,
        error_fp32=_error(fast, exact),
        limit_fp32=rounding / 2**8,
        same_tokens=_equal(tokens, fast_tokens),
    )


@contextmanager
def _without_tf32() -> Iterator[None]:
    """Within it convolutions in float32 are what they say."""
    before = torch.backends.cudnn.allow_tf32
    torch.backends.cudnn.allow_tf32 = False
    try:
        yield
    finally:
        torch.backends.cudnn.allow_tf32 = before


@torch.no_grad()
def first_logits(model: Any, provider: Provider, inputs: Inputs) -> tuple[Tensor, list[Tensor]]:
    """By both of the calls that are timed, each made twice (what is captured in one is replayed in
    the next), `float32[4, B, V]`, and which tokens were kept."""
    found = []
    with provider.on(model) as handle:
        for _ in range(2):
            found.append(model(**inputs, logits_to_keep=1).logits[:, -1].float())
        for _ in range(2):
            out = model.generate(
                **inputs,
                max_new_tokens=1,
                do_sample=False,
                return_dict_in_generate=True,
                output_logits=True,
            )
            found.append(out.logits[0].float())
    kept = [] if handle is None else [s.mask().cpu() for s in handle.token_selections]
    return torch.stack(found), kept


def _error(got: Tensor, want: Tensor) -> float:
    return float((got - want).abs().max())


def _equal(a: list[Tensor], b: list[Tensor]) -> bool:
    # the stock model has no handle to ask
    if not a or not b:
        return True
    return len(a) == len(b) and all(torch.equal(x, y) for x, y in zip(a, b, strict=True))
