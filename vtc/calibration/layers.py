"""ShortV's LC score (arXiv 2504.00502): what freezing visual rows in one layer does to the answer.

LC of layer l = KL(p_frozen ‖ p_normal) of what may follow the last prompt token, in nats, where
"frozen" leaves the residual stream of visual rows in layer l as it was.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from vtc.calibration.prompt import Prompt


def contributions(prompt: Prompt, normal: Tensor) -> Tensor:
    """The LC score of every decoder layer, `float64[L]`.

    Args:
        prompt: whose images are encoded.
        normal: its log probabilities where nothing is frozen.
    """
    layers: Any = prompt.adapter.language_model.layers
    found = torch.zeros(len(layers), dtype=torch.float64)
    for i, layer in enumerate(layers):
        with frozen(layer, prompt.visual):
            log_p = prompt.log_probabilities()
        # the divergence of nearly equal distributions may come out below 0 by rounding
        found[i] = F.kl_div(normal, log_p, log_target=True, reduction="sum").clamp_min(0)
    return found


@contextmanager
def frozen(layer: nn.Module, visual: Tensor) -> Iterator[None]:
    """Within it, a decoder layer leaves the rows at `bool[S]` as they are.

    They are still attended to: attention and feed-forward network are residual, so this equals
    both giving 0 there.
    """

    def restore(module: nn.Module, args: Any, kwargs: dict[str, Any], output: Any) -> Any:
        before = args[0] if args else kwargs["hidden_states"]
        states = output[0] if isinstance(output, tuple) else output
        mixed = torch.where(visual.to(states.device)[:, None], before, states)
        return (mixed, *output[1:]) if isinstance(output, tuple) else mixed

    hook = layer.register_forward_hook(restore, with_kwargs=True)
    try:
        yield
    finally:
        hook.remove()
