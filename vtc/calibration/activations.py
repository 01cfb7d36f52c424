"""Massive activations: phi(x)[d] = |x[d]| / RMS(x) of the residual stream x, per decoder layer.

A token is an attention sink where phi of one of the model's sink dimensions exceeds tau (VAR, arXiv
2503.03321, which also calls these tokens visual attention sinks where they are visual).
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from vtc.calibration.prompt import Prompt
from vtc.types import scale_layer

# as published; its code, like ours, takes the RMS with this epsilon under the root
TAU = 20.0
EPSILON = 1e-6
# layers 0 and 1 have no sinks, as published for 32; a dimension counts that is above tau in half of
# the others, and at most three do
_FIRST_LAYER, _DEPTH = 2, 32
_RECURS, _MOST = 0.5, 3


def sink_threshold(width: int) -> float:
    """tau for an LLM of this hidden size: 20 as published, or half of what phi can reach.

    All energy in one dimension is phi = sqrt(width), so on narrow models 20 is out of reach. From a
    width of 1,600 on, which has all models with published values but one of 1,536, it is 20.
    """
    return min(TAU, math.sqrt(width) / 2)


@dataclass(frozen=True)
class Activations:
    """The largest phi of three kinds of tokens in the input of each decoder layer.

    Over the tokens of a kind the largest counts, over samples their mean, per dimension; of the
    dimensions the largest again.

    Attributes:
        tau: the threshold that was in force.
        first: largest phi at the first token of the prompt, per layer.
        first_dim: in which dimension that is.
        text: of the other text tokens.
        text_dim: likewise.
        visual: of the visual tokens.
        visual_dim: likewise.
        text_sinks: per layer, how many tokens of a prompt are sinks, the first included, without
            visual ones; mean over samples.
        visual_sinks: how many visual tokens are.
    """

    tau: float
    first: tuple[float, ...]
    first_dim: tuple[int, ...]
    text: tuple[float, ...]
    text_dim: tuple[int, ...]
    visual: tuple[float, ...]
    visual_dim: tuple[int, ...]
    text_sinks: tuple[float, ...]
    visual_sinks: tuple[float, ...]

    @property
    def strongest(self) -> tuple[int, int, float]:
        """Layer, dimension and phi of the largest of all, whether or not it is a sink's."""
        kinds = (
            (self.first, self.first_dim),
            (self.text, self.text_dim),
            (self.visual, self.visual_dim),
        )
        phi, layer, dim = max(
            (value, layer, dim)
            for values, dims in kinds
            for layer, (value, dim) in enumerate(zip(values, dims, strict=True))
        )
        return layer, dim, phi


@dataclass(frozen=True, eq=False)
class Peaks:
    """The largest phi of each dimension in one prompt, `float32[L, D]` per kind of token, and how
    many tokens have one above tau in any dimension, `float32[L]`; on the CPU."""

    first: Tensor
    text: Tensor
    visual: Tensor
    text_sinks: Tensor
    visual_sinks: Tensor


def phi(x: Tensor) -> Tensor:
    """|x| / RMS(x) over the last dimension, float32."""
    x = x.float()
    result: Tensor = x.abs() * torch.rsqrt(x.square().mean(-1, keepdim=True) + EPSILON)
    return result


@contextmanager
def watching(prompt: Prompt) -> Iterator[Peaks]:
    """Within it, one run of the language model fills the peaks."""
    model: Any = prompt.adapter.language_model
    depth, width = len(model.layers), model.config.hidden_size
    tau = sink_threshold(width)
    peaks = Peaks(*(torch.zeros(depth, width) for _ in range(3)), *torch.zeros(2, depth))
    first = torch.zeros_like(prompt.valid)
    first[prompt.first] = True
    text, visual = prompt.valid & ~prompt.visual & ~first, prompt.visual & ~first

    def see(layer: int, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        x = phi((args[0] if args else kwargs["hidden_states"])[0])  # [S, D]
        for to, where in ((peaks.first, first), (peaks.text, text), (peaks.visual, visual)):
            if where.any():
                to[layer] = x[where.to(x.device)].amax(0).cpu()
        sinks = (x > tau).any(-1).cpu()
        peaks.text_sinks[layer] = (sinks & prompt.valid & ~prompt.visual).sum()
        peaks.visual_sinks[layer] = (sinks & prompt.visual).sum()

    with ExitStack() as stack:
        for i, layer in enumerate(model.layers):
            hook = layer.register_forward_pre_hook(partial(see, i), with_kwargs=True)
            stack.callback(hook.remove)
        yield peaks


def mean_peaks(peaks: Sequence[Peaks]) -> Peaks:
    """Their means over samples."""
    names = Peaks.__dataclass_fields__
    return Peaks(*(torch.stack([getattr(p, name) for p in peaks]).mean(0) for name in names))


def sink_dims(first: Tensor) -> tuple[int, ...]:
    """The dimensions in which sinks show, strongest first, of phi at the first token `[L, D]`."""
    depth, width = first.shape
    later = first[min(scale_layer(_FIRST_LAYER, _DEPTH, depth), depth - 1) :]
    recurs = (later > sink_threshold(width)).float().mean(0) >= _RECURS
    ranked = later.mean(0).argsort(descending=True, stable=True)
    return tuple(ranked[recurs[ranked]][:_MOST].tolist())


def summary(peaks: Peaks) -> Activations:
    """What is told of mean peaks."""

    def of(kind: Tensor) -> tuple[tuple[float, ...], tuple[int, ...]]:
        values, dims = kind.max(-1)
        return rounded(values), tuple(dims.tolist())

    return Activations(
        rounded(torch.tensor([sink_threshold(peaks.first.shape[1])]))[0],
        *of(peaks.first),
        *of(peaks.text),
        *of(peaks.visual),
        rounded(peaks.text_sinks),
        rounded(peaks.visual_sinks),
    )


def rounded(x: Tensor) -> tuple[float, ...]:
    """The numbers of a vector with six digits."""
    return tuple(float(f"{value:.6g}") for value in x.tolist())
