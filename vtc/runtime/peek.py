"""A language model's first layers, run once more to see what they make of a prompt."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from vtc.adapters.base import Adapter
from vtc.errors import SignalError


class _Reached(Exception):
    def __init__(self, hidden: Tensor) -> None:
        self.hidden = hidden


@torch.no_grad()
def layer_input(
    adapter: Adapter, layer: int, given: dict[str, Any], mask: Tensor, position_ids: Tensor
) -> Tensor:
    """The input of one decoder layer, `[B, S, D]`; the layers behind it are not run.

    Args:
        adapter: describes the model.
        layer: 0-based.
        given: what the stock base model feeds its language model.
        mask: `[B, S]`.
        position_ids: `[(P,) B, S]`.
    """
    model: Any = adapter.language_model

    def stop(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        raise _Reached(args[0] if args else kwargs["hidden_states"])

    hook = model.layers[layer].register_forward_pre_hook(stop, with_kwargs=True)
    kept = ("inputs_embeds", "visual_pos_masks", "deepstack_visual_embeds")
    inputs = {name: given[name] for name in kept if given.get(name) is not None}
    try:
        # past its hooks: seams that stand there wait for the prompt's own run
        model.forward(**inputs, attention_mask=mask, position_ids=position_ids, use_cache=False)
    except _Reached as reached:
        return reached.hidden
    finally:
        hook.remove()
    raise SignalError(
        f"decoder layer {layer} was not run, expected the stock forward of {type(model).__name__}"
    )
