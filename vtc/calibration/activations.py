"""Massive activations: phi(x)[d] = |x[d]| / RMS(x) of the residual stream x, per decoder layer.

A token is an attention sink where phi of one of the model's sink dimensions exceeds tau (VAR, arXiv
2503.03321, which also calls these tokens visual attention sinks where they are visual).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

# as published; its code, like ours, takes the RMS with this epsilon under the root
TAU = 20.0
EPSILON = 1e-6


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
