"""One patched model: its method, its last decision, and the step from full inputs to short ones."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn import functional as F

from vtc.adapters.base import Adapter
from vtc.checks import Deferred, deferred
from vtc.errors import (
    InputError,
    UnsupportedModeError,
    VtcError,
)
from vtc.methods.base import Method, Positions
from vtc.plans import LayerPlan, layers_as_tokens
from vtc.runtime.clock import Clock
from vtc.runtime.compaction import Compaction, Policy, by_row, plan
from vtc.runtime.deciding import decided
from vtc.runtime.images import Images, find_images
from vtc.runtime.layer_stage import LayerDecision
from vtc.runtime.layers import LayerSeam
from vtc.runtime.merging import merged
from vtc.runtime.report import kv_bytes, kv_lengths
from vtc.runtime.row_run import Expected
from vtc.runtime.row_seam import RowSeam
from vtc.runtime.short import (
    Full,
    Short,
    cells_of,
    placed_of,
    short_of,
    with_merges,
)
from vtc.runtime.tower import Inside, Tower, facts_of
from vtc.types import Budget, Selection, Signal

if TYPE_CHECKING:
    from vtc.runtime.encodings import Encodings
    from vtc.runtime.fast import Fast
    from vtc.runtime.fast_encoder import Encoded


@dataclass
class Call:
    """What is remembered of a call that had images.

    Attributes:
        selection: what reached the language model.
        earlier: what stages before the last one before it left, in order.
        decisions: what each cut between decoder layers left of `slots`.
        inside: what cuts inside the encoder left, in original patches.
        kv_lengths: entries of each decoder layer's cache after the prefill.
        slots: which original token each visual token is that reached the language model,
            `int64[G, N]`.
        plans: what was said about decoder layers instead of tokens.
    """

    images: Images
    selection: Selection
    clock: Clock
    keep: float | int | None
    new_tokens: int | None = None
    kv_bytes: int | None = None
    kv_lengths: tuple[int, ...] = ()
    decisions: list[LayerDecision] = field(default_factory=list)
    earlier: tuple[Selection, ...] = ()
    inside: Inside | None = None
    slots: Tensor = field(default_factory=lambda: torch.empty(0, dtype=torch.long))
    plans: list[LayerPlan] = field(default_factory=list)

    @cached_property
    def later(self) -> dict[int, Selection]:
        """What cuts between decoder layers left, by layer; asks the device."""
        found, slots, images = {}, self.slots.cpu(), self.images
        for decision in self.decisions:
            kept = torch.zeros(len(images.lengths), max(images.lengths), dtype=torch.bool)
            group, slot = decision.keep.cpu().nonzero(as_tuple=True)
            kept[group, slots[group, slot]] = True
            left = Selection.of_mask(
                kept, images.lengths, images.parent, images.grids, images.parts
            )
            if decision.merged is not None:
                left = with_merges(left, *decision.merged, slots)
            found[decision.layer] = left
        return found

    @property
    def encoder(self) -> Selection | None:
        """What is left of the patches, where the encoder cut."""
        return None if self.inside is None else self.inside.selection

    @property
    def block_patches(self) -> tuple[int, ...]:
        """Patches through each block of the encoder; empty where none were cut."""
        return () if self.inside is None else self.inside.block_patches


class Session:
    """State shared by the seams of one patched model.

    Args:
        adapter: describes the model.
        method: decides.
        budget: how much is kept.
        positions: what becomes of position ids.
        seed: for methods that draw.

    Attributes:
        policy: what becomes of position ids of what reaches the language model.
        last: the last call, or None if it had no images.
        prompt: what the stock language model gets of the call under way, its mask and position ids;
            None behind a cache.
        fast: what is captured, or None.
        encodings: what the encoder gave in earlier calls, for those that come again; or None.
        encoded: what a captured encoder gave in the call under way.
        kernels: which implementation of tensor operations is asked for.
        ran: which of them ran in the last call, by operation.
        checks: of numbers on the device, not answered yet.
    """

    def __init__(
        self, adapter: Adapter, method: Method, budget: Budget, positions: Positions, seed: int
    ) -> None:
        self.adapter = adapter
        self.method = method = method.on(facts_of(adapter))
        self.budget = budget
        self.seed = seed
        self.tower = Tower(adapter, method)
        facts = self.tower.facts
        self.policy: Policy = method.published_positions if positions == "published" else positions
        between = method.published_between(facts) if positions == "published" else positions
        cuts, anew = method.llm_layers(facts, budget), between == "renumber"
        self.layers = LayerSeam(adapter, method, cuts, lambda: self.budget, facts, anew)
        self.rows = RowSeam(
            adapter, self._plan(), method.rule_layers(facts), method.layer_rule, self.layers
        )
        self._hiding = ExitStack()
        self._earlier: tuple[Selection, ...] = ()
        self.prompt: tuple[dict[str, Any], Tensor, Tensor] | None = None
        self._image_key: Tensor | None = None
        self.last: Call | None = None
        self.fast: Fast | None = None
        self.encoded: Encoded | None = None
        self.encodings: Encodings | None = None
        self.kernels, self.ran = "auto", dict[str, str]()
        self.checks = Deferred()

    def _plan(self) -> LayerPlan:
        """What the method says about decoder layers under the budget in force."""
        facts = self.tower.facts
        return self.method.plan(layers_as_tokens(facts.llm_depth, self.seed), facts, self.budget)

    def set_budget(self, budget: Budget) -> None:
        """Change how much is kept from the next call on."""
        before, self.budget = self.budget, budget
        try:
            self.rows.plan = self._plan()
            self.layers.cut_after(self.method.llm_layers(self.tower.facts, budget))
        except VtcError:
            self.budget = before
            raise

    @property
    def acts_later(self) -> bool:
        """Whether something is done inside the LLM."""
        return self.layers.cuts or self.rows.acts

    @property
    def lasts(self) -> bool:
        """Whether it has to be done in steps behind the prompt too."""
        return self.layers.cuts or self.rows.lasts

    def clock(self, inputs: Mapping[str, Any]) -> Clock:
        """A clock that has just started."""
        device = self.adapter.model.device
        if device.type == "meta":  # weights are fetched when they are used
            given = inputs.get("input_ids", inputs.get("inputs_embeds"))
            device = getattr(given, "device", torch.device("cpu"))
        clock = Clock(device)
        clock.mark("start")
        self.tower.clock = self.layers.clock = clock
        return clock

    def images(self, inputs: Mapping[str, Any]) -> Images:
        """The images among a call's inputs; refuses what would change the encoder's features."""
        for name in self.adapter.feature_options:
            given, expected = inputs.get(name), getattr(self.adapter.model.config, name)
            if given is not None and given != expected:
                raise UnsupportedModeError(
                    f"{name}={given!r} was given in a call, expected {expected!r} as in "
                    "model.config: set it there before vtc.patch"
                )
        image = self.placeholders(inputs, self.adapter.image_token_id)
        video = self.adapter.video_token_id
        return find_images(
            self.adapter, inputs, image, None if video is None else self.placeholders(inputs, video)
        )

    def placeholders(self, inputs: Mapping[str, Any], token_id: int) -> Tensor:
        """Where visual tokens go: `bool[B, S]`; in embeddings they are found as stock does."""
        ids, embeds = inputs.get("input_ids"), inputs.get("inputs_embeds")
        if isinstance(ids, Tensor) and ids.dim() == 2:
            return ids == token_id
        if ids is None and isinstance(embeds, Tensor) and embeds.dim() == 3:
            token = torch.tensor(token_id, device=embeds.device)
            return (embeds == self.embedded(token)).all(-1)
        got = tuple(ids.shape) if isinstance(ids, Tensor) else type(ids).__name__
        raise InputError(
            f"pixel_values came with input_ids of {got}, expected a tensor [B, S] of ids"
        )

    def check_text(self, inputs: Mapping[str, Any]) -> None:
        """Refuse placeholders in a fresh call without pixels: stock would read them as text."""
        ids = inputs.get("input_ids")
        if not isinstance(ids, Tensor) or inputs.get("inputs_embeds") is not None:
            return
        for token in (self.adapter.image_token_id, self.adapter.video_token_id):
            if token is not None and (count := int((ids == token).sum())):
                raise InputError(
                    f"input_ids hold {count} image placeholders and no pixel_values came with "
                    "them, expected both or neither: pass the processor's whole output"
                )

    def embedded(self, ids: Tensor) -> Tensor:
        """The text embeddings of ids."""
        return self.adapter.model.get_input_embeddings()(ids)  # type: ignore[no-any-return]

    def note(self, images: Images, selection: Selection | None, clock: Clock) -> None:
        """Remember a decision as the last call's; None: everything was kept, nothing decided."""
        decided = selection if selection is not None else self.everything(images)
        self.last = Call(images, decided, clock, self.budget.keep)
        self.last.earlier = () if selection is None else self._earlier
        if selection is not None:
            self.last.inside = self.tower.inside(images)

    def everything(self, images: Images) -> Selection:
        """The decision to keep all."""
        return Selection.everything(images.lengths, images.parent, images.grids, images.parts)

    def note_cache(self, cache: Any) -> None:
        """The prefill is over: what cuts between layers left, and how long the cache is."""
        if (call := self.last) is None:
            return
        call.kv_bytes, call.kv_lengths = kv_bytes(cache), kv_lengths(cache)
        call.plans = list(self.rows.plans)
        if self.layers.cuts:
            call.decisions = self.layers.decisions

    def expect_layers(self, images: Images, short: Short) -> None:
        """Tell the seams inside the LLM where visual tokens stand in the next prefill."""
        if not self.acts_later or self.last is None:
            return
        placed = short.placed
        if placed is None:
            selection, cuts = self.last.selection, self.fast is not None and self.fast.with_cuts
            lengths = tuple(selection.slots.tolist()) if cuts else None
            placed = placed_of(images, short, selection.slot_positions.shape[1], lengths)
        self.last.slots = placed.index
        self.layers.expect(placed, short.attention_mask)
        near = any(rule.radius is not None for rule in self.rows.plan.rules)
        self.rows.expect(
            Expected(
                placed,
                short.attention_mask,
                cells_of(images, placed) if near else None,
                self._image_key,
                self.seed,
            )
        )

    @contextmanager
    def deepstack(self, short: Short) -> Iterator[None]:
        """Within it, the language model's first run on embeddings of this length gets its
        DeepStack features, which generate does not hand on."""
        if short.deep is None:
            yield
            return

        def add(
            module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
        ) -> tuple[tuple[Any, ...], dict[str, Any]]:
            hook.remove()
            repeats = len(kwargs["inputs_embeds"]) // len(short.visual)
            return args, {**kwargs, **short.deepstack(repeats)}

        hook = self.adapter.language_model.register_forward_pre_hook(add, with_kwargs=True)
        try:
            yield
        finally:
            hook.remove()

    def hide_gaps(self) -> None:
        """Until `show_gaps`, decoder layers get no position ids: flash attention reads gaps in them
        as the borders of packed sequences. Rotary angles are made before."""
        self.show_gaps()
        model: Any = self.adapter.language_model
        if "flash" not in str(model.config._attn_implementation):
            return

        def hide(
            module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
        ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
            if kwargs.get("position_ids") is None:
                return None
            return args, {**kwargs, "position_ids": None}

        for layer in model.layers:
            hook = layer.register_forward_pre_hook(hide, with_kwargs=True)
            self._hiding.callback(hook.remove)

    def show_gaps(self) -> None:
        """Leave the decoder layers as they were."""
        self._hiding.close()

    def embedded_only(self, ids: Tensor) -> Full:
        """Text embeddings of ids, placeholders included."""
        return Full(self.embedded(ids))

    def clear_layers(self) -> None:
        """Forget a prefill that never came."""
        self.layers.clear()
        self.rows.clear()

    def keeps_all(self, images: Images) -> bool:
        """Whether the budget leaves every image whole, so that nothing has to run."""
        return all(step.keeps_all(images.lengths) for step in self.method.steps(self.budget))

    @contextmanager
    def recording(
        self, images: Images, inputs: Mapping[str, Any], masked: bool = False
    ) -> Iterator[None]:
        """Within it, the encoder's runs over these images are read and cut; `masked`, what is cut
        is hidden."""
        self.method.check_lengths(images.lengths)
        with self.tower.recording(images, inputs, self.budget, self.seed, masked):
            yield

    def recall(
        self, images: Images, inputs: Mapping[str, Any], found: Mapping[Any, list[Tensor]]
    ) -> None:
        """In place of `recording`: the encoder ran over the same pixels before, and left this."""
        self.method.check_lengths(images.lengths)
        self.tower.recall(images, inputs, found)

    def decide(self, images: Images, features: Tensor, inputs: Mapping[str, Any]) -> Selection:
        """Run the method, step by step, on padded groups of tokens `[G, N, D]`."""
        with deferred(self.checks) if self.fast is not None else nullcontext():
            found = decided(self, images, features, inputs)
        draws = self.tower.draws(self.method)
        self._image_key = self.tower.keys(images, inputs) if draws else None
        self.layers.draw_by(self._image_key, self.seed)
        self._earlier = tuple(found[:-1])
        return found[-1] if found else self.everything(images)

    def decide_before(self, images: Images, inputs: Mapping[str, Any]) -> Selection:
        """Run a method that acts on pixels: there are no tokens yet."""
        pixels = self.adapter.pixels(inputs, list(images.visuals))
        nothing = torch.zeros(*images.columns.shape, 0, device=pixels[0].device)
        return self.decide(images, nothing, inputs)

    def shorten(
        self,
        images: Images,
        selection: Selection,
        full: Full,
        attention_mask: Tensor,
        position_ids: Tensor,
        small: list[Tensor] | None = None,
    ) -> Short:
        """Apply a decision to full embeddings `[B, S, D]`, mask `[B, S]` and position ids.

        `small` holds each image's tokens when they are not in `embeds` (the pixel site).
        """
        embeds = full.stacked
        width = full.embeds.shape[-1]
        self.check_window(embeds.shape[1])
        # with a model spread over devices, ids may be elsewhere than what the encoder made of them
        mask, ids = attention_mask.to(embeds.device), position_ids.to(embeds.device)
        # where nothing is dropped there is nothing to renumber
        policy = "keep" if selection.is_identity else self.policy
        compaction = self.planned(images, selection, mask, policy)
        appended = None
        if small is not None:
            if len(images.newlines) and (newline := self.adapter.newline) is not None:
                at = images.to(embeds.device).newlines
                embeds = embeds.index_put((at[:, 0], at[:, 1]), newline.to(embeds))
            appended = by_row(small, images.rows, len(embeds))
            embeds = F.pad(embeds, (0, appended.shape[-1] - embeds.shape[-1]))
        elif selection.merge is not None or selection.sends_cls:
            appended, embeds = merged(self, images, selection, embeds)
        short = compaction.gather(embeds, appended)
        deep = short[..., width:] if short.shape[-1] > width else None
        return short_of(compaction, short[..., :width].contiguous(), mask, ids, policy, deep)

    def planned(
        self, images: Images, selection: Selection, mask: Tensor, policy: Policy
    ) -> Compaction:
        """How rows are shortened. Where the prefill is captured, they are padded to the next length
        of its own."""
        width = None if self.fast is None else self.fast.width(images, selection, mask.shape)
        return plan(images, selection, mask, policy, width)

    def check_window(self, length: int) -> None:
        """Refuse prompts longer than a sliding attention window."""
        window = getattr(self.adapter.language_model.config, "sliding_window", None)
        if window is not None and length > window:
            raise UnsupportedModeError(
                f"a prompt of {length} tokens meets a language model whose attention "
                f"slides over {window}, expected at most as many: its window counts the tokens "
                "that are left, so that dropping some would move it"
            )

    def encode_small(
        self, images: Images, selection: Selection, inputs: Mapping[str, Any]
    ) -> list[Tensor]:
        """Each image's tokens when the method resizes the image itself."""
        resize: Any = self.method
        slots = selection.slots.tolist()
        grids = [v.grids[v.overview or 0] for v in images.visuals]
        sizes = [resize.size(grid, n) for grid, n in zip(grids, slots, strict=True)]
        return self.adapter.encode_resized(inputs, list(images.visuals), sizes)

    def begin(self) -> None:
        """A call with images begins."""
        self.ran.clear()
        self.checks, self.encoded = Deferred(), None
        if self.fast is not None:
            self.fast.begin()

    @property
    def pads(self) -> bool:
        """Whether short rows are padded to a length that a captured prefill takes."""
        return self.fast is not None and self.fast.prefills

    def signals(self, needs: tuple[Signal, ...]) -> dict[str, Tensor]:
        """What the encoder left in the call under way, by key."""
        if self.encoded is None:
            return self.tower.read(needs)
        found = self.encoded.signals
        return {need.key: found[need] for need in needs if need in found}
