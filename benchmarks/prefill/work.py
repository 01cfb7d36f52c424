"""What a prefill computes: FLOPs by torch's counter, by arithmetic, and the rows that linears see.

Both count from the language model's embeddings to the first logits, attention as if nothing were
masked (as torch's counter does).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count

from vtc.adapters.registry import adapter_of
from vtc.plans import LayerRule

LINEARS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


@dataclass
class Work:
    """Of one prefill.

    Attributes:
        flops: between the embeddings and the first logits.
        rows: by linear of the layer that was looked at, rows it was given.
    """

    flops: int = 0
    rows: dict[str, int] = field(default_factory=dict)


def _attention(query: Any, key: Any, value: Any, *args: Any, **kwargs: Any) -> int:
    """By the shapes of its inputs."""
    return int(sdpa_flop_count(query, key, value))


# the counter does not know the CPU's attention
_CPU = {torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _attention}


@contextmanager
def counting(model: Any, layer: int) -> Iterator[Work]:
    """Within it one call of the model is counted; `layer` is the layer to look at."""
    work, before = Work(), 0
    language: Any = adapter_of(model).language_model

    def enter(module: nn.Module, args: Any) -> None:
        nonlocal before
        before = counter.get_total_flops()

    def leave(module: nn.Module, args: Any, output: Any) -> None:
        work.flops = counter.get_total_flops() - before

    def seen(name: str) -> Callable[[nn.Module, Any], None]:
        def see(module: nn.Module, args: Any) -> None:
            rows = args[0].numel() // args[0].shape[-1]
            work.rows[name] = work.rows.get(name, 0) + rows

        return see

    named = dict(language.layers[layer].named_modules())
    found = {path.rpartition(".")[2]: module for path, module in named.items()}
    hooks = [found[name].register_forward_pre_hook(seen(name)) for name in LINEARS]
    hooks.append(language.register_forward_pre_hook(enter))
    hooks.append(model.get_output_embeddings().register_forward_hook(leave))
    try:
        with FlopCounterMode(display=False, custom_mapping=_CPU) as counter:
            yield work
    finally:
        for hook in hooks:
            hook.remove()


@dataclass(frozen=True)
class LayerRows:
    """Rows of one decoder layer in a prefill, over the whole batch but `keys`.

    Attributes:
        all: rows that become keys and values.
        attending: rows that issue queries.
        ffn: rows that go through the feed-forward network.
        keys: keys that a query meets.
    """

    all: int
    attending: int
    ffn: int
    keys: int


def layer_flops(config: Any, rows: LayerRows) -> int:
    """Of one layer of a Llama with as many key/value heads as heads."""
    width, inner = config.hidden_size, config.intermediate_size
    linears = 2 * rows.all * width + 2 * rows.attending * width + 3 * rows.ffn * inner
    return int(2 * linears * width + 4 * rows.attending * rows.keys * width)


def arithmetic(
    model: Any, batch: int, text: int, lengths: Sequence[int], rules: Sequence[LayerRule]
) -> int:
    """What `Work.flops` should be; scores that a cut between layers computes are left out.

    Args:
        model: the model.
        batch: B.
        text: entries of a prompt that are no visual tokens.
        lengths: entries of a prompt in each decoder layer.
        rules: what visual rows do in each.
    """
    config: Any = adapter_of(model).language_model.config
    # logits of the last entry alone
    total = int(2 * batch * config.hidden_size * config.vocab_size)
    for length, rule in zip(lengths, rules, strict=True):
        attending, ffn = (length if runs else text for runs in (rule.attention, rule.ffn))
        rows = LayerRows(batch * length, batch * attending, batch * ffn, length)
        total += layer_flops(config, rows)
    return total
