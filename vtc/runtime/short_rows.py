"""A decoder layer run on text rows alone: what visual rows skip is not computed.

The layer gets the text rows' hidden states. Keys and values of the visual rows are computed beside
it, from the layer's own modules, and join where the layer hands its own to the cache; with the
feed-forward network kept, visual rows join the text rows for it.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor, nn

from vtc import ops


@dataclass(frozen=True, eq=False)
class Split:
    """The entries of a sequence as text rows and visual rows.

    Attributes:
        text: `int64[B, T]`, where each text row stands; 0 on padding.
        text_valid: `bool[B, T]`.
        visual: `int64[B, V]`, where each visual row stands; 0 on padding.
        visual_valid: `bool[B, V]`.
        order: `int64[B, L]`, where each entry is found in text rows followed by visual rows.
        is_visual: `bool[B, L]`.
    """

    text: Tensor
    text_valid: Tensor
    visual: Tensor
    visual_valid: Tensor
    order: Tensor
    is_visual: Tensor

    @classmethod
    def of(cls, visual: Tensor) -> Split:
        """The split of `bool[B, L]`."""
        counts = visual.sum(-1)
        most, least = torch.stack([counts.max(), counts.min()]).tolist()
        width = visual.shape[1] - least
        here = torch.arange(visual.shape[1], device=visual.device)
        text_valid = here[:width] < (visual.shape[1] - counts)[:, None]
        visual_valid = here[:most] < counts[:, None]
        text = visual.int().argsort(dim=-1, stable=True)[:, :width]
        images = (~visual).int().argsort(dim=-1, stable=True)[:, :most]
        ranks = (~visual).long().cumsum(-1) - 1
        return cls(
            text=text.masked_fill(~text_valid, 0),
            text_valid=text_valid,
            visual=images.masked_fill(~visual_valid, 0),
            visual_valid=visual_valid,
            order=torch.where(visual, width + visual.long().cumsum(-1) - 1, ranks),
            is_visual=visual,
        )

    def repeated(self, batch: int) -> Split:
        """Of rows that generate has repeated for beams."""
        copies = batch // len(self.order)
        return self if copies == 1 else self._with(lambda x: x.repeat_interleave(copies, 0))

    def to(self, device: torch.device) -> Split:
        """The same on a device."""
        return self if self.order.device == device else self._with(lambda x: x.to(device))

    def _with(self, change: Callable[[Tensor], Tensor]) -> Split:
        return Split(**{f.name: change(getattr(self, f.name)) for f in fields(self)})

    def texts(self, x: Tensor) -> Tensor:
        """The text rows `[B, T, ...]` of `x [B, L, ...]`, zeros on padding."""
        return ops.compact(x, self.text, self.text_valid)

    def visuals(self, x: Tensor) -> Tensor:
        """The visual rows `[B, V, ...]` of `x [B, L, ...]`, zeros on padding."""
        return ops.compact(x, self.visual, self.visual_valid)

    def joined(self, text: Tensor, visual: Tensor, dim: int = 1) -> Tensor:
        """Text rows and visual rows, along `dim`, as entries in their order."""
        both = torch.cat([text, visual.to(text.device)], dim)
        shape = [1] * both.dim()
        shape[0], shape[dim] = self.order.shape
        index = self.order.to(both.device).view(shape)
        wide = list(both.shape)
        wide[dim] = self.order.shape[1]
        return both.gather(dim, index.expand(wide))

    def angles(self, x: Tensor, index: Tensor) -> Tensor:
        """Cosines or sines `[..., 1 or B, L, d]` of the rows at `int64[B, R]`."""
        x = x.expand(*x.shape[:-3], len(index), -1, -1)
        at = index.to(x.device)[..., None]
        return x.gather(-2, at.expand(*x.shape[:-3], *at.shape[:-1], x.shape[-1]))


class ShortRows:
    """One run of one decoder layer on text rows.

    Args:
        layer: the decoder layer.
        split: of its entries.
        given: its inputs by name, over all entries.
        visible: `bool[B, 1, L, T]`, which keys each entry may see.
        ffn: whether visual rows go through the feed-forward network.
    """

    def __init__(
        self, layer: nn.Module, split: Split, given: dict[str, Any], visible: Tensor, ffn: bool
    ) -> None:
        self._layer: Any = layer
        self._split = split
        self._cache = given.get("past_key_values")
        self._keys = visible.shape[-1]
        hidden: Tensor = given["hidden_states"]
        self._visual = split.visuals(hidden)
        angles = given["position_embeddings"]
        self._visual_angles = tuple(split.angles(x, split.visual) for x in angles)
        rows = visible.expand(len(hidden), -1, -1, -1)[:, 0]
        seen = split.texts(rows) | ~split.text_valid[..., None]
        self.inputs: dict[str, Any] = {
            "hidden_states": split.texts(hidden),
            "attention_mask": seen[:, None],
            "position_embeddings": tuple(split.angles(x, split.text) for x in angles),
            # rotary angles are all that is made of them
            "position_ids": None,
            "past_key_values": self,
        }
        self._hooks: list[Any] = []
        self._added: Tensor | None = None
        if ffn:
            mlp: Any = self._layer.mlp
            self._hooks = [
                mlp.register_forward_pre_hook(self._before_ffn),
                mlp.register_forward_hook(self._behind_ffn),
            ]

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_"):
            raise AttributeError(name)
        return getattr(self._cache, name)

    def update(
        self, key: Tensor, value: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Called by the layer's attention in the place of its cache's: keys and values `[B, H, T,
        d]` of text rows become those of all entries, behind what the cache holds."""
        normed = self._layer.input_layernorm(self._visual.to(key.device))
        angles = tuple(x.to(key.device) for x in self._visual_angles)
        more = keys_and_values(self._layer.self_attn, normed, angles)
        key, value = (
            self._split.joined(text, visual, dim=2)
            for text, visual in zip((key, value), more, strict=True)
        )
        if self._cache is not None:
            key, value = self._cache.update(key, value, *args, **kwargs)
        # a static cache gives all that is allocated
        return key[:, :, : self._keys], value[:, :, : self._keys]

    def _before_ffn(self, module: nn.Module, args: tuple[Any, ...]) -> tuple[Tensor]:
        (text,) = args
        normed = self._layer.post_attention_layernorm(self._visual.to(text.device))
        return (torch.cat([text, normed], 1),)

    def _behind_ffn(self, module: nn.Module, args: Any, output: Tensor) -> Tensor:
        width = self._split.text.shape[1]
        self._added = output[:, width:]
        return output[:, :width]

    def close(self) -> None:
        """Take the hooks off the layer."""
        while self._hooks:
            self._hooks.pop().remove()

    def whole(self, text: Tensor) -> Tensor:
        """The layer's output over all entries, from that of its text rows `[B, T, D]`."""
        visual = self._visual.to(text.device)
        if self._added is not None:
            visual = visual + self._added.to(text.device)
        return self._split.joined(text, visual)


def keys_and_values(
    attention: nn.Module, hidden: Tensor, angles: tuple[Tensor, ...]
) -> tuple[Tensor, Tensor]:
    """What a stock attention module makes of normed rows `[B, V, D]`, without their queries.

    Args:
        attention: the module.
        hidden: its input.
        angles: cosines and sines of the rows.

    Returns:
        Keys, rotary positions applied, and values, `[B, H, V, d]` each.
    """
    module: Any = attention
    shape = (*hidden.shape[:-1], -1, module.head_dim)
    key = module.k_proj(hidden).view(shape)
    norm = getattr(module, "k_norm", None)
    key = (key if norm is None else norm(key)).transpose(1, 2)
    value = module.v_proj(hidden).view(shape).transpose(1, 2)
    rotate = sys.modules[type(attention).__module__].apply_rotary_pos_emb
    # it turns two at once; the other is given up
    return rotate(key, key, *angles)[1], value


class FfnRows:
    """The feed-forward network of one decoder layer on text rows; visual rows get nothing added.

    Args:
        layer: the decoder layer.
        split: of its entries.
    """

    def __init__(self, layer: nn.Module, split: Split) -> None:
        mlp: Any = layer.mlp
        self._split = split
        self._hooks = [
            mlp.register_forward_pre_hook(self._before),
            mlp.register_forward_hook(self._behind),
        ]

    def _before(self, module: nn.Module, args: tuple[Any, ...]) -> tuple[Tensor]:
        return (self._split.texts(args[0]),)

    def _behind(self, module: nn.Module, args: Any, output: Tensor) -> Tensor:
        shape = (*self._split.visual.shape, output.shape[-1])
        return self._split.joined(output, output.new_zeros(shape))

    def close(self) -> None:
        """Take the hooks off the layer."""
        while self._hooks:
            self._hooks.pop().remove()
