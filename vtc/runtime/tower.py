"""The vision tower of a patched model while it runs: what is read off it and what is cut in it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from vtc.adapters.base import Adapter
from vtc.errors import SignalError
from vtc.methods.base import Method, Step
from vtc.runtime.clock import Clock
from vtc.runtime.cuts import EncoderCuts
from vtc.runtime.images import Images
from vtc.runtime.layouts import by_image
from vtc.runtime.masked_cuts import MaskedCuts, Masking
from vtc.runtime.packed_layout import frames_of
from vtc.runtime.probe import implementation, probed
from vtc.runtime.rows import Run, runs_of
from vtc.runtime.signals import EncoderSignals
from vtc.sites import Facts
from vtc.types import CLS_FEATURES, VECTORS, Budget, Selection, Signal

# of splitmix64, as a signed number
_ODD = -0x61C8864680B583EB
_POSITIVE = 2**63 - 1


def facts_of(adapter: Adapter) -> Facts:
    """What a method may know about a model."""
    encoder = adapter.encoder()
    text: Any = adapter.language_model.config
    return Facts(
        encoder_depth=encoder.depth,
        tap=encoder.tap,
        has_cls=encoder.has_cls,
        patches_per_token=adapter.patches_per_token,
        tiled=adapter.tiled,
        llm_depth=len(adapter.language_model.layers),  # type: ignore[arg-type]
        first_layer_cut=max(adapter.deepstack_layers - 1, 0),
        llm_heads=text.num_attention_heads,
        llm_width=text.hidden_size,
        llm_kind=text.model_type,
        name=adapter.model.config._name_or_path or "",
        llm_kv_heads=text.num_key_value_heads,
        projects=adapter.projects,
    )


@dataclass(frozen=True, eq=False)
class Inside:
    """What cuts inside the encoder left in a call; read off the device when it is asked for.

    Attributes:
        lengths: `int64[L]`, patches through each block; empty where none were cut.
        masks: for each image, `bool[t, h, w]` over its patches; empty if the tower was not run.
        parent: as in `Selection`.
    """

    lengths: Tensor
    masks: tuple[Tensor, ...]
    parent: Tensor

    @cached_property
    def block_patches(self) -> tuple[int, ...]:
        """Patches through each block."""
        return tuple(self.lengths.tolist())

    @cached_property
    def selection(self) -> Selection | None:
        """The decision over patches."""
        if not self.masks:
            return None
        grids = [(m.shape[0], m.shape[1], m.shape[2]) for m in self.masks]
        whole = pad_sequence([m.flatten() for m in self.masks], batch_first=True)
        return Selection.of_mask(whole, [m.numel() for m in self.masks], self.parent, grids)


class Tower:
    """Signals and cuts of one patched model's encoder.

    Args:
        adapter: describes the model.
        method: says what it needs and where it cuts.

    Attributes:
        facts: what the method may know.
        signals: rows for methods that decide before the LLM.
        cuts: None for methods that do not cut inside the encoder.
        masked: the same cuts by hiding patches, where a call asks for it.

    Raises:
        SignalError: the method cannot work on this encoder.
    """

    def __init__(self, adapter: Adapter, method: Method) -> None:
        self.adapter, self.encoder = adapter, adapter.encoder()
        self.facts = facts_of(adapter)
        method.check_facts(self.facts)
        self.method = method
        self.signals = EncoderSignals(self.encoder, method.needs)
        blocks = method.encoder_blocks(self.facts)
        if method.site == "encoder" and not blocks:
            raise SignalError(
                f"method {method.name!r} cuts inside the encoder and finds no block for it, "
                f"expected more than the {self.facts.tap + 1} blocks up to the feature tap"
            )
        if blocks and self.signals.feature_blocks:
            raise SignalError(
                f"method {method.name!r} looks at features of the encoder behind cuts between its "
                "blocks, expected no such cuts: choose a stage that reads tokens of the LLM"
            )
        self.cuts: EncoderCuts | None = None
        self.masked: MaskedCuts | None = None
        if blocks:
            steps = method.steps(Budget(None))
            cutter = next((s.method for s in steps if s.method.site == "encoder"), method)
            behind = self.signals.finish_block
            self.cuts = EncoderCuts(adapter, self.encoder, cutter, blocks, behind)
            self.masked = MaskedCuts(adapter, self.encoder, cutter, blocks, behind)
        # of the call under way, told how long cuts take
        self.clock: Clock | None = None
        self._runs: list[Run] = []
        self._keys: tuple[Images, Tensor] | None = None
        self._rows: tuple[Images, Tensor] | None = None

    @contextmanager
    def recording(
        self,
        images: Images,
        inputs: Mapping[str, Any],
        budget: Budget,
        seed: int = 0,
        masked: bool = False,
    ) -> Iterator[None]:
        """Within it, a call's runs of the tower leave their signals here and are cut, or `masked`,
        see `mask_refusal`."""
        self._runs = runs_of(self.adapter, self.encoder, images.visuals, inputs)
        self.signals.clear()
        waiting = list(self._runs)

        def behind(module: nn.Module, args: Any, output: Any) -> None:
            if waiting:
                self.signals.finish(waiting.pop(0))

        with ExitStack() as stack:
            self.clear_cuts()
            if (cuts := self.masked if masked else self.cuts) is not None:
                cuts.clock = None if masked else self.clock  # a graph is timed as a whole
                for step in self.cutting(images, budget):
                    keys = self.keys(images, inputs) if self.draws(step.method) else None
                    cuts.attach(stack, self._runs, step.budget, keys, seed)
            for block in self.signals.blocks:
                see = partial(self._see, block)
                stack.enter_context(probed(self.encoder.attentions[block], see))
            for block in self.signals.feature_blocks:
                read = partial(self._see_output, block)
                stack.callback(self.encoder.blocks[block].register_forward_hook(read).remove)
            if self.signals.blocks or self.signals.feature_blocks:
                stack.callback(self.adapter.tower.register_forward_hook(behind).remove)
            yield

    def recall(
        self, images: Images, inputs: Mapping[str, Any], found: Mapping[Any, list[Tensor]]
    ) -> None:
        """In place of `recording`: take what an uncut run over the same pixels left."""
        self._runs = runs_of(self.adapter, self.encoder, images.visuals, inputs)
        self.clear_cuts()
        self.signals.recall(found)

    def replayed(self, images: Images, inputs: Mapping[str, Any]) -> None:
        """In place of `recording`: its runs over images of these sizes were one captured call."""
        self._runs = runs_of(self.adapter, self.encoder, images.visuals, inputs)
        self.clear_cuts()

    def _see(self, block: int, query: Tensor, key: Tensor, value: Tensor, scale: float) -> None:
        self.signals.see(block, query, key, scale)

    def _see_output(self, block: int, module: nn.Module, args: Any, output: Any) -> None:
        self.signals.see_output(block, output[0] if isinstance(output, tuple) else output)

    def clear_cuts(self) -> None:
        """Forget what cuts left of an earlier call."""
        for cuts in (self.cuts, self.masked):
            if cuts is not None:
                cuts.clear()

    def mask_refusal(self, images: Images, budget: Budget) -> str | None:
        """Why what is cut of these images cannot be hidden instead; None if it can, or if nothing
        is cut."""
        if not self.cutting(images, budget) or self.cuts is None:
            return None
        if not isinstance(self.cuts.method, Masking):
            return "how many patches go on between its blocks depends on them"
        kind = implementation(self.encoder.attentions[0])
        if self.encoder.packed and kind not in ("sdpa", "eager"):
            return f"its attention is {kind!r}, which takes no masks; load it with sdpa"
        return self.cuts.method.mask_refusal()

    def cutting(self, images: Images, budget: Budget) -> list[Step]:
        """The step that cuts inside the encoder, unless it would cut nothing of these images."""
        steps = self.method.steps(budget) if self.cuts is not None else ()
        inside = [step for step in steps if step.method.site == "encoder"]
        return [step for step in inside if not step.keeps_all(images.lengths)]

    def draws(self, method: Method) -> bool:
        """Whether a method goes by numbers made from the pixels, see `keys`."""
        asked = any(signal.name == "image_key" for signal in method.needs)
        return asked or any(signal in method.needs for signal in self.signals.draws)

    def keys(self, images: Images, inputs: Mapping[str, Any]) -> Tensor:
        """A number made from the pixels of each image alone, `int64[G]` on the CPU."""
        if self._keys is None or self._keys[0] is not images:
            pixels = self.adapter.pixels(inputs, list(images.visuals))
            # one copy to the host for all of them
            self._keys = images, torch.stack([_key(p) for p in pixels]).cpu()
        return self._keys[1]

    def read(self, needs: tuple[Signal, ...] | None = None) -> dict[str, Tensor]:
        """Signals of the call by key, these or all: rows `float32[G, L, N]` and vectors
        `[G, N, D]`, zeros on padding."""
        wide = (*VECTORS, CLS_FEATURES)
        vectors = {s.key for s in self.signals.windows if s.name in wide}
        found = {}
        for key, parts in self.signals.read(self._runs, needs).items():
            padded = pad_sequence([p.T for p in parts], batch_first=True)
            found[key] = padded if key in vectors else padded.transpose(1, 2)
        return found

    def read_each(self) -> dict[Signal, Tensor]:
        """The same of all signals but those that are drawn, told apart: stages of a composition may
        ask for other blocks under the same key."""
        found = {signal: self.read((signal,)) for signal in self.signals.windows}
        return {signal: read[signal.key] for signal, read in found.items() if read}

    def encoder_rows(self, images: Images) -> Tensor:
        """The crop, tile or frame of its image that each token is from, most of it where it is of
        several: `int64[G, N]` on the CPU, 0 on padding."""
        if self._rows is None or self._rows[0] is not images:
            parts: list[Tensor] = []
            for run in self._runs:
                parts += run.encoder_rows()
            self._rows = images, pad_sequence(parts, batch_first=True)
        return self._rows[1]

    def inside(self, images: Images) -> Inside | None:
        """What cuts left of the patches of each image; None for methods without."""
        if self.cuts is None:
            return None
        if self.masked is not None and (left := self.masked.left) is not None:
            masks = (
                frames_of(left.patches, images.visuals, self.adapter.patches_per_token)
                if self.encoder.packed
                else by_image(left.patches, [v.rows for v in images.visuals])
            )
            return Inside(left.lengths, tuple(masks), images.parent)
        count = len(images.visuals)
        found = self.cuts.patches if len(self.cuts.patches) == count else {}
        return Inside(
            torch.tensor(self.cuts.lengths), tuple(found[i] for i in sorted(found)), images.parent
        )

    def survivors(self, images: Images) -> Tensor | None:
        """Which LLM tokens are left of each image, `bool[G, N]`; None if the tower was not run."""
        if self.cuts is None or len(self.cuts.survivors) != len(images.visuals):
            return None
        parts = [self.cuts.survivors[i] for i in range(len(images.visuals))]
        return pad_sequence(parts, batch_first=True)


def _key(pixels: Tensor) -> Tensor:
    """A number from the bits of all values and their places, the same on every device.

    Whole numbers that wrap, so that their sum does not depend on its order. Values are not copied
    to the host: of a large picture that takes longer than its prefill.
    """
    bits = pixels.detach().float().flatten().contiguous().view(torch.int32).long()
    place = torch.arange(len(bits), device=bits.device)
    mixed = (bits ^ (place * _ODD)) * _ODD
    return ((mixed ^ (mixed >> 29)) * _ODD).sum() & _POSITIVE
