"""The fast path: encoder, prefill and decode steps without launch overhead, or a reason why not."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from vtc.checks import deferred
from vtc.errors import OptionError
from vtc.runtime.attributes import replaced
from vtc.runtime.cache import remember, remembered
from vtc.runtime.compaction import longest
from vtc.runtime.graphs import Backend, CaptureError, Graphs
from vtc.runtime.watch import Watch, attached, wrapped
from vtc.types import Selection

if TYPE_CHECKING:
    from vtc.runtime.clock import Clock
    from vtc.runtime.fast_encoder import Encoded
    from vtc.runtime.images import Images
    from vtc.runtime.session import Session
    from vtc.runtime.short import Short


def checked(fast: Any) -> bool | str:
    """`fast` of `vtc.patch`.

    Raises:
        OptionError: it is unknown.
    """
    if isinstance(fast, bool) or (isinstance(fast, str) and fast in ("compile", "eager")):
        return fast
    raise OptionError(
        f"fast={fast!r} is unknown; expected True, False, 'compile' to compile what is captured "
        "too, or 'eager' for the fast path's code without capture"
    )


class Fast:
    """What is captured of one patched model.

    Args:
        session: the patched model's state.
        fast: True, `"compile"` or `"eager"`, as in `vtc.patch`.

    Attributes:
        told: by part ("encoder", "selection", "prefill", "decode"), how the last call ran it: the
            backend, or why it was left to the stock model.
        with_cuts: whether the prefill of the call under way is captured with what is decided
            between its layers.
    """

    def __init__(self, session: Session, fast: bool | str) -> None:
        from vtc.runtime.fast_cuts import FastCuts
        from vtc.runtime.fast_encoder import FastEncoder
        from vtc.runtime.fast_llm import FastLanguageModel
        from vtc.runtime.fast_prefix import FastPrefix
        from vtc.runtime.fast_selection import FastSelection

        self.session = session
        backend: Backend = "eager" if fast == "eager" else "cuda"
        self.graphs = Graphs(session.adapter.model.device, backend)
        # the first run of what is compiled makes memory, the second one compiles
        self.graphs.warm_runs = 3 if fast == "compile" else 1
        self.selection = FastSelection(session, self.graphs)
        self.encoder = FastEncoder(session, self.graphs, fast == "compile")
        self.llm = FastLanguageModel(session.adapter, self.graphs, fast == "compile")
        self.prefix = FastPrefix(session.adapter, self.graphs, session.layers)
        self.cuts = FastCuts(session, self.graphs)
        self.told: dict[str, str] = {}
        self._first = 0  # layers that are captured where the whole is not
        self.with_cuts = False
        self._closed = 0
        self._under_way = 0
        self._blocked: str | None = None
        self._llm_blocked: str | None = None
        self._watched: dict[str, Watch] | None = None

    @property
    def held_bytes(self) -> int:
        """Memory of what is captured and of its caches; once closed, what it was."""
        now = self.graphs.bytes + self.llm.held_bytes + self.encoder.aligned.held_bytes
        return self._closed or now

    def close(self) -> None:
        """Drop all that is captured, for good."""
        self._closed = self.held_bytes
        self.clear()

    @property
    def prefills(self) -> bool:
        """Whether the prefill of the call under way may be captured."""
        return self._llm_blocked is None or self.with_cuts or self._first > 0

    def clear(self) -> None:
        """Drop all that is captured."""
        self.graphs.clear()
        self.encoder.aligned.clear()
        self.selection.clear()
        self.llm.clear()

    def begin(self) -> None:
        """A call begins: whether anything can be captured, and whether what is still holds."""
        # caches and captures of the call around it are in use
        reason = "it runs within another call" if self._under_way else self._why_not()
        self._blocked = reason or self._attached("tower")
        plain = reason is None and self._plain()
        self.with_cuts = plain and self._captures_cuts()
        self._first = self._before_cuts() if plain else 0
        self._llm_blocked = reason or self._why_not_llm() or self._attached("llm")
        self.told = dict.fromkeys(("encoder", "selection"), self._blocked or "not run")
        self.told |= dict.fromkeys(("prefill", "decode"), self._llm_blocked or "not run")

    def compress(
        self,
        images: Images,
        inputs: Mapping[str, Any],
        mask: Tensor,
        positions: Tensor,
        clock: Clock,
    ) -> tuple[Encoded, tuple[list[Selection], Short] | None] | None:
        """The encoder's tokens and what is made of them: decisions and the short prompt, or None
        where they are not captured. None alone where the stock model has to encode."""
        ids, device = inputs["input_ids"], inputs["input_ids"].device
        refused = self._blocked or self.encoder.refusal(images, inputs)
        if refused is not None:
            self.told |= dict.fromkeys(("encoder", "selection"), refused)
            return None
        # copies wait for the device: before it has work
        if self.session.tower.draws(self.session.method):
            self.session.tower.keys(images, inputs)
        given, staged = self.encoder.prepare(images, inputs), None
        why = self.selection.refusal() if self.prefills else self._llm_blocked
        if why is None:
            staged = self.selection.stage(images, ids, mask, positions, given.key)
        if staged is None or not self.graphs.holds(staged.key):
            images.to(device)
        try:
            encoded = self.encoder(images, given)
        except CaptureError as error:
            self.told |= dict.fromkeys(("encoder", "selection"), str(error))
            return None
        self.told["encoder"] = self.graphs.said(given.key)
        if staged is None:
            self.told["selection"] = str(why)
            return encoded, None
        clock.mark("encoded")
        try:
            done = self.selection(images, staged, encoded)
            self.told["selection"] = self.graphs.said(staged.key)
        except CaptureError as error:
            done, self.told["selection"] = None, str(error)
        return encoded, done

    def width(self, images: Images, selection: Selection, shape: torch.Size) -> int | None:
        """The length that short rows are padded to; None: of their longest."""
        from vtc.runtime.fast_llm import bucket

        return bucket(longest(images, selection, shape)) if self.prefills else None

    @contextmanager
    def generating(
        self, prompt: int, given: dict[str, Tensor], more: int | None, custom: bool = False
    ) -> Iterator[None]:
        """Within it, a stock generate on short embeddings runs captured.

        Args:
            prompt: length of the original prompt, from which generate counts.
            given: embeddings, mask and position ids of the short prompt.
            more: how many tokens generate will add at most, as far as can be told before; None: it
                cannot, or their first run is not worth to be started before.
            custom: whether the caller has a decoding loop of his own, which may do anything to its
                cache.
        """
        if self._llm_blocked is not None:
            with self.forwarding():
                yield
            return
        if more is not None:
            with deferred(self.session.checks):
                self.llm.run_ahead(given["inputs_embeds"].shape[1] + more, **given)
        model: Any = self.session.adapter.model
        stock, prepared = model._prepare_cache_for_generation, False

        def prepare(
            generation_config: Any,
            model_kwargs: dict[str, Any],
            generation_mode: Any,
            batch_size: int,
            max_cache_length: int,
        ) -> Any:
            nonlocal prepared
            out = stock(
                generation_config, model_kwargs, generation_mode, batch_size, max_cache_length
            )
            if prepared:  # of another generate, that a logits processor runs within this one
                return out
            prepared = True
            reason = _why_not_generate(generation_config, model_kwargs, generation_mode)
            reason = "custom_generate was given" if custom else reason
            embeds = model_kwargs.get("inputs_embeds")
            if reason is None and embeds is not None:
                more = generation_config.max_length - prompt
                rows = batch_size * (generation_config.num_return_sequences or 1)
                model_kwargs["past_key_values"] = self.llm.cache(rows, embeds.shape[1] + more)
            else:
                self.llm.refused = reason or "it runs on ids"
            return out

        with (
            replaced(model, "_prepare_cache_for_generation", prepare),
            self._serving(generates=True),
            deferred(self.session.checks),
        ):
            yield

    @contextmanager
    def _entered(self) -> Iterator[None]:
        self._under_way += 1
        try:
            yield
        finally:
            self._under_way -= 1

    @contextmanager
    def _serving(self, generates: bool) -> Iterator[None]:
        try:
            with self._entered(), self.llm.serving(generates):
                yield
        finally:
            self.told |= self.llm.told

    @contextmanager
    def forwarding(self) -> Iterator[None]:
        """Within it, the language model's runs are captured where they can be."""
        if self._llm_blocked is None:
            with self._serving(generates=False):
                yield
        elif self.with_cuts:
            with self._entered(), self.cuts.serving():
                yield
            self.told["prefill"] = self.cuts.told or self._llm_blocked
        elif self._first:
            with self._entered(), self.prefix.serving(self._first):
                yield
            if (said := self.prefix.told) == self.graphs.backend:
                said = f"{said} up to layer {self._first - 1}; then {self._llm_blocked}"
            self.told["prefill"] = said or self._llm_blocked
        else:
            yield

    def handed_out(self, out: Any) -> Any:
        """What generate returned, with a cache that its caller may keep."""
        from vtc.runtime.static_cache import CountedCache

        cache = getattr(out, "past_key_values", None)
        if isinstance(cache, CountedCache):
            out.past_key_values = cache.snapshot()
            remember(out.past_key_values, remembered(cache))
        return out

    def _why_not(self) -> str | None:
        """Why nothing can be captured now; drops what no longer holds."""
        model: Any = self.session.adapter.model
        device = model.device
        if self.graphs.backend == "cuda" and device.type != "cuda":
            return f"no CUDA device: the model is on {device.type}"
        if len(set(getattr(model, "hf_device_map", {}).values())) > 1:
            return "the model is spread over several devices"
        if model.training:
            return "the model is in training mode; call model.eval()"
        if torch.is_grad_enabled():
            return "gradients may be wanted; run it under torch.no_grad()"
        if torch.is_autocast_enabled(device.type):
            return "autocast is on; load the model in the dtype wanted"
        if (
            self._watched is None
            or self.encoder.aligned.stale
            or any(watch.changed for watch in self._watched.values())
        ):
            self.clear()
            self._watched = self._watch()
        return None

    def _watch(self) -> dict[str, Watch]:
        """The language model, and everything else that is captured. Hooks of the language model
        itself are run around a replay, those of the base model around all."""
        adapter = self.session.adapter
        model: Any = adapter.language_model
        inside = set(model.modules())
        outside = [m for m in adapter.base.modules() if m not in inside and m is not adapter.base]
        return {
            "llm": Watch(inside - {model}, [model], self.session.layers.owns),
            "tower": Watch(outside, [adapter.base]),
        }

    def _plain(self) -> bool:
        """Whether cuts are all that is done between decoder layers."""
        layers, adapter = self.session.layers, self.session.adapter
        if not layers.cuts or self.session.rows.acts or adapter.deepstack_layers:
            return False
        model: Any = adapter.language_model
        if any("forward" in vars(layer) for layer in model.layers):
            return False  # somebody else runs it
        return self.llm.refusal() is None

    def _captures_cuts(self) -> bool:
        return self.cuts.refusal() is None and self._attached("llm") is None

    def _before_cuts(self) -> int:
        """How many decoder layers run before the method first decides between them, where they are
        worth to be captured by themselves."""
        layers = self.session.layers
        if self.with_cuts or layers.first_seen < 2:
            return 0
        model: Any = self.session.adapter.language_model
        # the method's own hooks are on the layers behind
        later = {m for layer in model.layers[layers.first_seen :] for m in layer.modules()}
        earlier = (m for m in model.modules() if m is not model and m not in later)
        foreign = attached(earlier, layers.owns) or next(filter(None, map(wrapped, later)), None)
        return 0 if foreign else layers.first_seen

    def _attached(self, part: str) -> str | None:
        return None if self._watched is None else self._watched[part].refusal()

    def _why_not_llm(self) -> str | None:
        session = self.session
        if session.layers.cuts:
            why = "the method decides between decoder layers by what they see"
            # without that, some methods' prefills are captured all the same
            anew = session.layers.recounts
            return f"{why}, and positions are counted anew behind its cuts" if anew else why
        if session.rows.acts:
            return "the method has visual rows skip work in decoder layers"
        if session.adapter.deepstack_layers:
            return "features of inner encoder blocks are added between decoder layers"
        return self.llm.refusal()


def _why_not_generate(config: Any, model_kwargs: Mapping[str, Any], mode: Any) -> str | None:
    """Why a generate's steps are not captured; None if they are."""
    if mode.value not in ("greedy_search", "sample"):
        return f"{mode.value} reorders or crops its cache"
    if config.cache_implementation not in (None, "dynamic"):
        return f"cache_implementation={config.cache_implementation!r} was asked for"
    if config.use_cache is False:
        return "use_cache=False was asked for"
    if config.output_attentions or config.output_hidden_states:
        return "hidden states or attentions are wanted"
    from transformers import DynamicCache

    cache: Any = model_kwargs.get("past_key_values")
    if type(cache) is not DynamicCache or cache.get_seq_length():
        return "it goes on behind a cache of the caller's"
    return None
