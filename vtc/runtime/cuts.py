"""Cuts inside the vision encoder: fewer patches from block to block, whole grids before and behind.

Every survivor keeps its place: behind the last block the rows are filled up with zeros again, so
that the stock merger, pixel shuffle and packing find them in their own cells. What the zeros become
is dropped before the LLM.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack, nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from vtc.adapters.base import Adapter, Encoder, Visual
from vtc.errors import UnsupportedModeError, VtcError
from vtc.methods.base import Method
from vtc.runtime.clock import Clock
from vtc.runtime.layouts import RowLayout
from vtc.runtime.packed_layout import PackedLayout
from vtc.runtime.probe import probed
from vtc.runtime.rows import Run
from vtc.sites import BlockView
from vtc.types import Budget


class EncoderCuts:
    """Runs a method's cuts between the blocks of the tower.

    Args:
        adapter: describes the model.
        encoder: its tower.
        method: decides.
        blocks: the blocks after which it does.
        behind: told of every block that has run and of the patches that it ran on.

    Attributes:
        lengths: for each block, the patches that went through it in the last call, over all rows;
            a [CLS] is not counted.
        survivors: for each image, `bool[N]` over its LLM tokens.
        patches: for each image, `bool[t, h, w]` over its original patches, all rows.
        clock: told how long decisions take, with the layout that they leave; or None.
    """

    def __init__(
        self,
        adapter: Adapter,
        encoder: Encoder,
        method: Method,
        blocks: tuple[int, ...],
        behind: Callable[[int, RowLayout | PackedLayout], None],
    ) -> None:
        self.adapter, self.encoder, self.method = adapter, encoder, method
        self.blocks, self._done = frozenset(blocks), behind
        self.lengths: list[int] = []
        self.survivors: dict[int, Tensor] = {}
        self.patches: dict[int, Tensor] = {}
        self.clock: Clock | None = None
        self._runs: list[Run] = []
        self._visuals: list[Visual] = []
        self._budget = Budget(None)
        self._drawing: tuple[Tensor | None, int] = None, 0
        self._layout: RowLayout | PackedLayout | None = None
        self._seen: list[tuple[Tensor, Tensor, Tensor, float]] = []
        self._carry: dict[str, Tensor] = {}

    def clear(self) -> None:
        """Forget what an earlier call left."""
        self.lengths = []
        self.survivors.clear()
        self.patches.clear()

    def attach(
        self,
        stack: ExitStack,
        runs: list[Run],
        budget: Budget,
        image_key: Tensor | None = None,
        seed: int = 0,
    ) -> None:
        """Put hooks and probes on the tower until `stack` closes.

        Args:
            stack: closes behind the call.
            runs: of the tower in this call.
            budget: how much is kept.
            image_key: `int64[G]`, a number made from the pixels of each image; None: not needed.
            seed: for methods that draw.
        """
        self._refuse(runs)
        self.clear()
        self.lengths = [0] * self.encoder.depth
        self._runs, self._budget, self._drawing = list(runs), budget, (image_key, seed)
        self._visuals = [v for run in runs for v in run.visuals]
        for b, (block, attention) in enumerate(
            zip(self.encoder.blocks, self.encoder.attentions, strict=True)
        ):
            hook = block.register_forward_pre_hook(partial(self._before, b), with_kwargs=True)
            stack.callback(hook.remove)
            stack.enter_context(probed(attention, partial(self._see, b), self._mask))
        tower = self.adapter.tower
        hooks = [tower.register_forward_hook(self._behind)]
        hooks += [j.register_forward_pre_hook(self._at_joint) for j in self.encoder.joints]
        for hook in hooks:
            stack.callback(hook.remove)

    def _refuse(self, runs: list[Run]) -> None:
        if self.adapter.tower.training and torch.is_grad_enabled() and _checkpoints(self.adapter):
            raise UnsupportedModeError(
                f"method {self.method.name!r} cuts inside the encoder while it trains with "
                "gradient checkpointing, expected one or the other: the cut would be decided anew "
                "in the backward pass; call model.gradient_checkpointing_disable()"
            )
        for run in runs:
            for i, visual in zip(run.members, run.visuals, strict=True):
                if why := self.adapter.blends(run.inputs, i, visual):
                    kind = "a video" if visual.video else "an image"
                    raise UnsupportedModeError(
                        f"method {self.method.name!r} cuts patches inside the encoder and got "
                        f"{kind} of which {why}, expected patches that become tokens of their own: "
                        "use a method that acts before the LLM, or a smaller image"
                    )

    def _before(
        self, block: int, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Cut by what the block before said; the first block starts a run."""
        named = dict(kwargs)
        hidden = args[0] if args else named.pop("hidden_states")
        if block == 0:
            self._layout, self._carry = self._laid_out(self._runs.pop(0), hidden), {}
            hidden = self._layout.ordered(hidden)
            hidden = self._cut_behind(-1, self._layout, hidden)
        elif self._layout is not None:
            self._layout.follow(hidden.device)
            self._done(block - 1, self._layout)
            hidden = self._cut_behind(block - 1, self._layout, hidden)
        self._seen.clear()
        if (layout := self._layout) is None:
            return args, kwargs
        layout.entering(block)
        self.lengths[block] += layout.patches
        return (hidden, *args[1:]), layout.arguments(named)

    def _cut_behind(self, block: int, layout: RowLayout | PackedLayout, hidden: Tensor) -> Tensor:
        """The output of a block without what is dropped behind it; −1: the first block's input."""
        if block not in self.blocks:
            return hidden
        with self.clock.span("encoder") if self.clock is not None else nullcontext():
            return self._decided(layout, block, hidden)

    def _laid_out(self, run: Run, hidden: Tensor) -> RowLayout | PackedLayout:
        """All units of a run, of whose first block this is the input."""
        kind = PackedLayout if self.encoder.packed else RowLayout
        return kind(self.encoder, run, hidden)

    def _see(self, block: int, query: Tensor, key: Tensor, value: Tensor, scale: float) -> None:
        if block in self.blocks:
            self._seen.append((query, key, value, scale))

    def _mask(self, query: Tensor) -> Tensor | None:
        return self._layout.mask(query) if self._layout is not None else None

    def _view(self, layout: RowLayout | PackedLayout, block: int, hidden: Tensor) -> BlockView:
        """What is left of every row, as a block saw it that gave `hidden`."""
        run = layout.run
        return BlockView(
            block=block,
            tap=self.encoder.tap,
            valid=layout.reaching,
            index=layout.index,
            units=layout.reachable,
            image=run.image - run.members[0],
            tokens=tuple(v.tokens for v in run.visuals),
            rows=tuple(v.rows for v in run.visuals),
            has_cls=self.encoder.has_cls,
            carry={name: x.to(hidden.device) for name, x in self._carry.items()},
            video=tuple(v.video for v in run.visuals),
            image_key=_row_keys(run, self._drawing[0]),
            seed=self._drawing[1],
            **(self._pixels(layout, hidden) if block < 0 else self._attention(layout)),
        )

    def _attention(self, layout: RowLayout | PackedLayout) -> dict[str, Any]:
        """What the attention of the last block computed with."""
        queries, keys, values, scales = zip(*self._seen, strict=True)
        return {
            "query": layout.assembled(list(queries)),
            "key": layout.assembled(list(keys)),
            "value": layout.assembled(list(values)),
            "scale": scales[0],
        }

    def _pixels(self, layout: RowLayout | PackedLayout, hidden: Tensor) -> dict[str, Any]:
        """What there is in front of the first block: pixels, and nothing of attention."""
        run, rows = layout.run, len(layout.valid)
        whole = self.adapter.pixels(run.inputs, self._visuals)
        places = int(self.encoder.has_cls) + layout.full * layout.m
        nothing = hidden.new_zeros(rows, 0, places, 0)
        return {
            **dict.fromkeys(("query", "key", "value"), nothing),
            "scale": 1.0,
            "pixels": layout.unit_pixels([whole[i] for i in run.members]).to(hidden.device),
            "cells": layout.unit_cells(),
        }

    def _decided(self, layout: RowLayout | PackedLayout, block: int, hidden: Tensor) -> Tensor:
        view = self._view(layout, block, hidden)
        with torch.no_grad():
            cut = self.method.encoder_cut(view, self._budget)
        self._carry = dict(cut.carry)
        if cut.keep is None:
            return hidden
        keep = self._checked(cut.keep, view.valid)
        # then padding of a canvas stays, too
        if torch.equal(keep, view.valid):
            return hidden
        if cut.into is not None and cut.weight is not None:
            hidden = layout.merge(hidden, cut.into, cut.weight)
        hidden, order = layout.cut(hidden, keep)
        if cut.size is not None:
            layout.weigh(cut.size, order)
        self._carry = {name: x.gather(1, order) for name, x in self._carry.items()}
        return hidden

    def _checked(self, keep: Tensor, valid: Tensor) -> Tensor:
        if keep.shape != valid.shape or keep.dtype != torch.bool:
            raise VtcError(
                f"method {self.method.name!r} cut by {keep.dtype}{tuple(keep.shape)}, expected "
                f"bool{tuple(valid.shape)}: return one for each unit of the view"
            )
        keep = keep & valid
        if bool((valid.any(1) & ~keep.any(1)).any()):
            raise VtcError(
                f"method {self.method.name!r} left a row without patches, expected at least one of "
                "each"
            )
        return keep

    def _at_joint(self, module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        if not isinstance(self._layout, PackedLayout):
            return args
        self._layout.follow(args[0].device)
        return (self._layout.restored(args[0]), *args[1:])

    def _behind(self, module: nn.Module, args: Any, output: Any) -> Any:
        """The run is over: fill up what is read of it, and note who survived."""
        layout, self._layout = self._layout, None
        self._seen.clear()
        if layout is None:
            return output
        self._done(layout.last, layout)
        self._noted(layout)
        if isinstance(layout, RowLayout):
            layout.restore_outputs(output)
        return output

    def _noted(self, layout: RowLayout | PackedLayout) -> None:
        alive = layout.alive(self.encoder.tap)
        run = layout.run
        masks = layout.patch_masks(alive)
        for i, where, mask in zip(run.members, layout.token_units, masks, strict=True):
            self.survivors[i] = alive.flatten()[where]
            self.patches[i] = mask


def _row_keys(run: Run, image_key: Tensor | None) -> Tensor | None:
    """A number for each row: that of its image, and how many of its rows come before it."""
    if image_key is None:
        return None
    before = torch.cat([torch.arange(int((run.image == i).sum())) for i in run.members])
    return image_key[run.image] + before


def _checkpoints(adapter: Adapter) -> bool:
    modules: Callable[[], Any] = adapter.tower.modules
    return any(getattr(m, "gradient_checkpointing", False) for m in modules())
