"""The whole prefill of a method that decides between decoder layers as one captured call.

Where sizes alone tell how much a cut leaves, the sequence behind it is as short as it would be
without the fast path. Where what is seen decides, nothing leaves the sequence within the call: what
was dropped is hidden from attention, and taken out behind it.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from functools import partial
from itertools import pairwise
from typing import TYPE_CHECKING, Any

from torch import Tensor

from vtc import dispatch
from vtc.checks import Deferred, Problem, deferred
from vtc.runtime.captured_run import CapturedRun, visible
from vtc.runtime.clock import Clock
from vtc.runtime.fast_prefix import odd
from vtc.runtime.graphs import CaptureError, Graphs
from vtc.runtime.layer_run import LayerRun
from vtc.runtime.layer_stage import LayerDecision, Placed
from vtc.runtime.probe import probed
from vtc.runtime.static_cache import CapturedEntries, fill

if TYPE_CHECKING:
    from vtc.runtime.session import Session

# of a stage what is made anew by a cut
_CUT = ("source", "real", "columns", "mask", "visual", "places", "valid", "slot", "newlines")
_PLACED = ("columns", "valid", "index", "visual", "newlines", "parent")


class FastCuts:
    """Stands in for all decoder layers while a prefill with cuts is served.

    Args:
        session: the patched model's state.
        graphs: holds what is captured.

    Attributes:
        told: how the last prefill ran: the backend, or why it was left to others.
    """

    def __init__(self, session: Session, graphs: Graphs) -> None:
        self.session, self.graphs = session, graphs
        self.model: Any = session.adapter.language_model
        self.told: str | None = None
        self._done: Tensor | None = None
        self._rest: Callable[[], Tensor] | None = None

    def refusal(self) -> str | None:
        """Why this method's cuts are not captured; None if they can be."""
        method = self.session.method
        if method.drops_earlier_kv:
            return "layers before the cut stop reading what it dropped"
        if self.session.layers.recounts:
            return "positions are counted anew behind a cut"
        return method.capture_refusal()

    @contextmanager
    def serving(self) -> Iterator[None]:
        """Within it, prefills of this thread are replayed."""
        owner = threading.get_ident()
        self.told, self._done, self._rest = None, None, None

        # named as in decoder layers: hooks look it up
        def forward(i: int, stock: Any, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
            if threading.get_ident() != owner or args:
                return stock(hidden_states, *args, **kwargs)
            if i == 0:
                self._done = self._run(hidden_states, kwargs)
            # the layers behind the first hand on what the first one gave for all of them
            if self._done is None or (i and hidden_states is not self._done):
                return stock(hidden_states, **kwargs)
            # what asks the device comes last: the host has the other layers' calls behind it
            return self._rest() if i == last and self._rest is not None else self._done

        last = len(self.model.layers) - 1
        with ExitStack() as stack:
            stack.callback(vars(self).update, _done=None, _rest=None)
            for i, layer in enumerate(self.model.layers):
                if "forward" not in vars(layer):
                    stack.callback(vars(layer).pop, "forward")
                    layer.forward = partial(forward, i, layer.forward)
            yield

    def _run(self, hidden: Tensor, kwargs: dict[str, Any]) -> Tensor | None:
        """What the last layer gives, `[B, L, D]`, or None where others have to run them."""
        run = self.session.layers.run
        if hidden.shape[1] == 1 or run is None or not run.stages:
            return None
        cache, first = kwargs.get("past_key_values"), run.stages[0]
        reason = odd(kwargs, cache, kwargs.get("attention_mask"), run)
        if first.extra or len(hidden) != len(first.mask):
            reason = "candidates or beams run along with the prompt"
        if first.placed.lengths is None:
            reason = "how many tokens reach it depends on them"
        if reason is None:
            try:
                return self._replayed(run, hidden, kwargs["position_embeddings"], cache)
            except CaptureError as error:
                reason = str(error)
        self.told = reason
        return None

    def _replayed(
        self, run: LayerRun, hidden: Tensor, angles: tuple[Tensor, Tensor], cache: Any
    ) -> Tensor:
        """What the last layer gives; the cache is filled and the run is over.

        Raises:
            CaptureError: it cannot be captured.
        """
        session, first = self.session, run.stages[0]
        placed = first.placed
        given = [hidden, *angles, first.mask, *(getattr(placed, name) for name in _PLACED)]
        key = (
            "layers with cuts",
            session.layers.at,
            repr(session.budget.keep),
            cache is not None,
            tuple((tuple(x.shape), x.dtype) for x in given),
            (placed.lengths, placed.tokens, placed.rows, placed.longest),
            self.model.config._attn_implementation,
        )
        function = partial(self._layers, placed, cache is not None)
        hidden, groups, left, flags, problems, clock, ran = self.graphs.run(
            key, function, given, patient=True
        )
        self.told = self.graphs.said(key)
        session.ran.update(ran)
        for flag, problem in zip(flags, problems, strict=True):
            session.checks.add(flag, problem)
        if session.layers.clock is not None:
            session.layers.clock.adopt(clock)
        run.replayed(cache)
        for layer, of in zip(session.layers.at, left, strict=True):
            before = run.stages[-1]
            if of["hidden"]:
                self._rest = partial(self._taken_out, run, layer, of["keep"], hidden, cache)
                continue
            run.stages.append(replace(before, **of["cut"]) if of["cut"] else before)
            run.decisions.append(LayerDecision(layer, of["keep"], run.stages[-1].entries))
        if cache is not None:
            CapturedEntries.into(cache, groups)
        return hidden

    def _taken_out(
        self, run: LayerRun, layer: int, keep: Tensor, hidden: Tensor, cache: Any
    ) -> Tensor:
        """Hidden states, and the entries of the layers behind a cut, without what was hidden in
        them."""
        with run.timed():
            before = run.stages[-1]
            after = before.cut(keep)
            run.stages.append(after)
            run.decisions.append(LayerDecision(layer, after.keep, after.entries))
            if after is before:
                return hidden
            index = after.source[:, None, :, None]
            for i, own in enumerate(cache.layers if cache is not None else []):
                if i > layer:
                    at = index.expand(-1, own.keys.shape[1], -1, own.keys.shape[3])
                    fill(cache, i, own.keys.gather(2, at), own.values.gather(2, at))
            return after.take(hidden)

    def _layers(
        self, known: Placed, keeps: bool, hidden: Tensor, cos: Tensor, sin: Tensor, *more: Tensor
    ) -> tuple[Any, ...]:
        """The layers' output, keys and values of each, what cuts left, and what is to be checked.

        Reads nothing off the device.
        """
        session, mask = self.session, more[0]
        moved: dict[str, Any] = dict(zip(_PLACED, more[1:], strict=True))
        placed = replace(known, **moved)
        cache = CapturedEntries(len(self.model.layers), session.layers.at) if keeps else None
        clock = Clock(hidden.device, captured=True)
        shared: dict[str, Any] = {"position_embeddings": (cos, sin), "past_key_values": cache}
        given = {"inputs_embeds": hidden, "attention_mask": mask, "past_key_values": cache}
        run = CapturedRun(self.model, session.layers.at, 1, None, given)
        checks, ran = Deferred(), dict[str, str]()
        with ExitStack() as stack:
            stack.enter_context(dispatch.using(session.kernels, ran))
            stack.enter_context(deferred(checks))
            for layer in session.layers.at:
                attention = self.model.layers[layer].self_attn
                stack.enter_context(probed(attention, partial(run.see, layer)))
            run.counts = session.layers.counts
            run.begin(placed, mask, session.layers.decide, clock)
            shared["attention_mask"] = visible(hidden, run.stages[0].mask)
            for i, layer in enumerate(self.model.layers):
                own = shared | (run.inputs(i, shared | {"hidden_states": hidden}) or {})
                hidden = own.pop("hidden_states", hidden)
                hidden = type(layer).forward(layer, hidden, use_cache=keeps, **own)
        groups = [] if cache is None else cache.groups
        problems: list[Problem] = checks.messages
        return hidden, groups, _left_by(run), checks.flags, problems, clock, ran


def _left_by(run: CapturedRun) -> list[dict[str, Any]]:
    """Of each cut what it kept of the tokens of `Placed`, whether it did so by hiding the others,
    and else what is new about the stage behind it."""
    found: list[dict[str, Any]] = []
    for before, stage in pairwise(run.stages):
        shorter = stage.source is not before.source
        own = {name: getattr(stage, name) for name in _CUT} if shorter else {}
        hidden = not shorter and stage is not before
        found.append({"keep": stage.keep, "hidden": hidden, "cut": own})
    return found
