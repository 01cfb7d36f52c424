"""YOPO's ratio (arXiv 2410.06169): how much of its attention a head gives to visual tokens.

ratio = attention to visual keys / attention to text keys before and behind them, each summed over
all queries of the prompt; a head is active on a sample where it exceeds alpha.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor

from vtc.calibration.prompt import Prompt
from vtc.errors import UnsupportedModeError
from vtc.runtime.probe import probed

# a head is kept that is active in more than 40 of the paper's 100 samples
ACTIVE_SHARE = 0.4


@contextmanager
def reading_heads(prompt: Prompt) -> Iterator[Tensor]:
    """Within it, one run of the language model leaves the ratios in `float64[L, H]`."""
    model: Any = prompt.adapter.language_model
    _check_window(model.config, len(prompt.valid))
    ratios = torch.full((len(model.layers), model.config.num_attention_heads), math.nan).double()

    def see(layer: int, query: Tensor, key: Tensor, value: Tensor, scale: float) -> None:
        ratios[layer] = _ratios(query[0], key[0], scale, prompt).cpu()

    with ExitStack() as stack:
        for i, layer in enumerate(model.layers):
            stack.enter_context(probed(layer.self_attn, partial(see, i)))
        yield ratios


def _check_window(config: Any, entries: int) -> None:
    window = getattr(config, "sliding_window", None)
    if window is not None and entries > window:
        raise UnsupportedModeError(
            f"a prompt of {entries} tokens meets a language model whose attention slides over "
            f"{window}, expected at most as many: what its heads read is measured under full "
            "attention; use shorter prompts or leave 'heads' out"
        )


def _ratios(query: Tensor, key: Tensor, scale: float, prompt: Prompt) -> Tensor:
    """`float64[H]` of queries `[H, S, d]` and keys `[H/g, S, d]`; one map `[S, S]` at a time."""
    visual, valid = prompt.visual.to(query.device), prompt.valid.to(query.device)
    group, entries = len(query) // len(key), query.shape[1]
    hidden = ~torch.ones(entries, entries, dtype=torch.bool, device=query.device).tril() | ~valid
    found = []
    for h, q in enumerate(query.float()):
        logits = (q @ key[h // group].float().T) * scale  # [S, S]
        # the row of a padding query has no key to see
        weights = logits.masked_fill(hidden, -math.inf)[valid].softmax(-1)
        received = weights.sum(0).double()  # [S]
        found.append(received[visual].sum() / received[valid & ~visual].sum())
    return torch.stack(found)


def head_threshold(ratios: Tensor) -> Tensor:
    """Of the ratios of n samples `[n, L, H]`, the alpha from which on a head is not kept `[L, H]`.

    "Active in more than 40 % of the samples" is "this exceeds alpha".
    """
    rank = math.floor(ACTIVE_SHARE * len(ratios))
    return ratios.sort(0, descending=True).values[rank]
