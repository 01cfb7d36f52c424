"""A decoder layer run on text rows alone: what visual rows skip is not computed.

The layer gets the text rows' hidden states. Keys and values of the visual rows are computed beside
it, from the layer's own modules, and join where the layer hands its own to the cache; with the
feed-forward network kept, visual rows join the text rows for it.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass, fields, replace
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
        order: `int64[B, L]`, where each entry is found in text rows, then visual rows, then a row
            of zeros for padding.
        is_visual: `bool[B, L]`.
        even: whether all rows have as many of either.
        padded: whether some entries are padding.
    """

    text: Tensor
    text_valid: Tensor
    visual: Tensor
    visual_valid: Tensor
    order: Tensor
    is_visual: Tensor
    even: bool
    padded: bool

    @classmethod
    def of(cls, visual: Tensor, real: Tensor | None = None) -> Split:
        """The split of `bool[B, L]`; what is not `real` either is padding, which is nobody's."""
        text = ~visual if real is None else ~visual & real
        texts, images = text.sum(-1), visual.sum(-1)
        none = (~(text | visual)).sum()
        found = torch.stack([texts.max(), texts.min(), images.max(), images.min(), none]).tolist()
        width, fewest, most, least, padding = found
        here = torch.arange(visual.shape[1], device=visual.device)
        text_valid = here[:width] < texts[:, None]
        visual_valid = here[:most] < images[:, None]
        first = (~text).int().argsort(dim=-1, stable=True)[:, :width]
        second = (~visual).int().argsort(dim=-1, stable=True)[:, :most]
        order = torch.where(visual, width + visual.long().cumsum(-1) - 1, width + most)
        return cls(
            text=first.masked_fill(~text_valid, 0),
            text_valid=text_valid,
            visual=second.masked_fill(~visual_valid, 0),
            visual_valid=visual_valid,
            order=torch.where(text, text.long().cumsum(-1) - 1, order),
            is_visual=visual,
            even=width == fewest and most == least,
            padded=padding > 0,
        )

    def repeated(self, batch: int) -> Split:
        """Of rows that generate has repeated for beams."""
        copies = batch // len(self.order)
        return self if copies == 1 else self._with(lambda x: x.repeat_interleave(copies, 0))

    def to(self, device: torch.device) -> Split:
        """The same on a device."""
        return self if self.order.device == device else self._with(lambda x: x.to(device))

    def _with(self, change: Callable[[Tensor], Tensor]) -> Split:
        parts = {f.name: getattr(self, f.name) for f in fields(self)}
        moved: dict[str, Any] = {k: change(v) for k, v in parts.items() if isinstance(v, Tensor)}
        return replace(self, **moved)

    def texts(self, x: Tensor) -> Tensor:
        """The text rows `[B, T, ...]` of `x [B, L, ...]`, zeros on padding."""
        return self._taken(x, self.text, self.text_valid)

    def visuals(self, x: Tensor) -> Tensor:
        """The visual rows `[B, V, ...]` of `x [B, L, ...]`, zeros on padding."""
        return self._taken(x, self.visual, self.visual_valid)

    def _taken(self, x: Tensor, index: Tensor, valid: Tensor) -> Tensor:
        if not self.even:
            return ops.compact(x, index, valid)
        if len(x) == 1:
            return x.index_select(1, index[0])
        return x[torch.arange(len(x), device=x.device)[:, None], index]

    def joined(self, text: Tensor, visual: Tensor, dim: int = 1) -> Tensor:
        """Text rows and visual rows, along `dim`, as entries in their order; padding is zeros."""
        parts = [text, visual.to(text.device)]
        if self.padded:
            shape = list(text.shape)
            shape[dim] = 1
            parts.append(text.new_zeros(shape))
        both = torch.cat(parts, dim)
        if len(both) == 1:
            return both.index_select(dim, self.order[0].to(both.device))
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


@dataclass(frozen=True, eq=False)
class TextRows:
    """What all layers that run on the text rows of one sequence have in common.

    Attributes:
        split: of the entries, on the layers' device, rows repeated for beams.
        mask: what text rows see, `[k·B, 1, T, keys]`, as the attention implementation wants it.
        keys: entries in the cache, and those of the run.
        angles: cosines and sines of text rows.
        visual_angles: the same of visual rows.
    """

    split: Split
    mask: Tensor
    keys: int
    angles: tuple[Tensor, ...]
    visual_angles: tuple[Tensor, ...]

    @classmethod
    def of(
        cls, split: Split, visible: Tensor, angles: tuple[Tensor, ...], additive: torch.dtype | None
    ) -> TextRows:
        """Of one sequence.

        Args:
            split: of its entries.
            visible: `bool[B or 1, 1, L, keys]`, which keys each entry may see.
            angles: cosines and sines of all entries.
            additive: the dtype of a mask to be added to logits; None: a mask of bool.
        """
        rows = visible.expand(len(split.order), -1, -1, -1)[:, 0]
        seen = split.texts(rows)
        # what a row that is padding sees does not matter, as long as it is something
        seen = (seen | ~seen.any(-1, keepdim=True))[:, None]
        if additive is not None:
            lowest = torch.finfo(additive).min
            zeros = torch.zeros(seen.shape, dtype=additive, device=seen.device)
            seen = zeros.masked_fill(~seen, lowest)
        return cls(
            split=split,
            mask=seen,
            keys=visible.shape[-1],
            angles=tuple(split.angles(x, split.text) for x in angles),
            visual_angles=tuple(split.angles(x, split.visual) for x in angles),
        )


class ShortRows:
    """One run of one decoder layer on text rows.

    Args:
        layer: the decoder layer.
        rows: of its entries.
        given: its inputs by name, over all entries.
        ffn: whether visual rows go through the feed-forward network.
    """

    def __init__(self, layer: nn.Module, rows: TextRows, given: dict[str, Any], ffn: bool) -> None:
        self._layer: Any = layer
        self._rows, self._split = rows, rows.split
        self._cache = given.get("past_key_values")
        hidden: Tensor = given["hidden_states"]
        self._visual = self._split.visuals(hidden)
        self.inputs: dict[str, Any] = {
            "hidden_states": self._split.texts(hidden),
            "attention_mask": rows.mask,
            "position_embeddings": rows.angles,
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
        angles = tuple(x.to(key.device) for x in self._rows.visual_angles)
        more = keys_and_values(self._layer.self_attn, normed, angles)
        key, value = (
            self._split.joined(text, visual, dim=2)
            for text, visual in zip((key, value), more, strict=True)
        )
        if self._cache is not None:
            key, value = self._cache.update(key, value, *args, **kwargs)
        # a static cache gives all that is allocated
        return key[:, :, : self._rows.keys], value[:, :, : self._rows.keys]

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
    # it turns two at once; the other has no head
    return rotate(key[:, :0], key, *angles)[1], value


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
