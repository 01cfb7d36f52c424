"""`vtc.patch`, `vtc.unpatch` and the handle that undoes everything."""

from __future__ import annotations

import functools
import operator
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import TracebackType
from typing import TYPE_CHECKING, Any, Literal, get_args

from torch import nn

from vtc import dispatch
from vtc.adapters.registry import adapter_of, stock_of
from vtc.errors import OptionError, PatchError, UnsupportedModeError
from vtc.methods.base import Method, Positions
from vtc.methods.registry import method as build_method
from vtc.plans import LayerPlan
from vtc.runtime.encodings import Encodings
from vtc.runtime.fast import Fast, checked
from vtc.runtime.forward import ForwardSeam
from vtc.runtime.generate import GenerateSeam
from vtc.runtime.report import Report, report_of
from vtc.runtime.session import Call, Session
from vtc.types import Selection

if TYPE_CHECKING:
    from PIL import Image


# the handle lives on the model, so that it dies with it
_HANDLE = "_vtc_handle"
_BATCHING = ("generate_batch", "init_continuous_batching", "continuous_batching_context_manager")


def _handle_of(model: object) -> Handle | None:
    """The handle of a patched model."""
    handle = getattr(model, "__dict__", {}).get(_HANDLE)
    return handle if isinstance(handle, Handle) and handle._model is model else None


class Handle:
    """A patched model. A context manager: leaving it removes the patch, also after an exception.

    While it is patched, the model can be saved but neither copied nor pickled.

    Attributes:
        method: the method in force.
    """

    def __init__(self, session: Session, positions: Positions) -> None:
        self.method = session.method
        self._session = session
        self._positions = positions
        self._model: Any = session.adapter.model
        self._forward = ForwardSeam(session)
        self._lock = threading.Lock()
        self._calls = 0
        self._removed = False
        self._overrides = {"generate": self._generate()}
        for name in _BATCHING:
            if hasattr(self._model, name):
                self._overrides[name] = self._refusal(name)
        own = vars(self._model)
        self._before = {name: own[name] for name in self._overrides if name in own}
        own.update(self._overrides)
        own[_HANDLE] = self
        self._forward.attach()
        session.layers.attach()
        session.rows.attach()

    def _generate(self) -> Callable[..., Any]:
        stock = self._model.generate
        seam = GenerateSeam(self._session, stock, self._forward)

        # pipelines inspect the signature, so the override keeps the stock one
        @functools.wraps(stock)
        def generate(*args: Any, **kwargs: Any) -> Any:
            # somebody may have kept this function beyond the patch
            if _handle_of(self._model) is not self:
                return stock(*args, **kwargs)
            with self._running():
                return seam(*args, **kwargs)

        return generate

    @contextmanager
    def _running(self) -> Iterator[None]:
        with self._lock:
            self._calls += 1
        try:
            yield
        finally:
            with self._lock:
                self._calls -= 1
                self._settle()

    def _settle(self) -> None:
        """Once removed, detach what no generate under way needs for its next token."""
        if self._removed and not (self._calls and self._forward.serving):
            self._forward.detach()
        if self._removed and not self._calls:
            self._session.layers.detach()
            self._session.rows.detach()
            if self._session.fast is not None:
                self._session.fast.close()

    def _refusal(self, name: str) -> Callable[..., Any]:
        @functools.wraps(getattr(self._model, name))
        def refuse(*args: Any, **kwargs: Any) -> Any:
            raise UnsupportedModeError(
                f"{name} (continuous batching) was called on a patched model, expected "
                "generate: it would run uncompressed; vtc.unpatch(model) first"
            )

        return refuse

    def set(self, *, keep: float | int) -> None:
        """Change the budget without patching again.

        Raises:
            OptionError: `keep` is out of range, or the method takes none.
            PatchError: the handle was removed: there is nothing to change.
        """
        budget = self.method.check_keep(keep)
        if _handle_of(self._model) is not self:
            raise PatchError(
                f"keep={keep!r} was set on a handle that was removed, expected one in force: call "
                "vtc.patch(model, ...) again"
            )
        self._session.set_budget(budget)

    def recall(self, encodings: Encodings) -> None:
        """Do not encode again what is among the encodings, and add what is not.

        For one who asks many methods the same questions of one model. What is cut inside the
        encoder, and what is resized before it, is encoded each time. Times in the report are then
        not those of the encoder.
        """
        self._session.encodings = encodings

    def remove(self) -> None:
        """Undo the patch; doing it twice is fine. Reports and selections stay readable.

        A generate that is running in another thread goes on with the tokens it has.
        """
        if _handle_of(self._model) is not self:
            return
        with self._lock:
            self._removed = True
            self._settle()
        own = vars(self._model)
        del own[_HANDLE]
        for name, function in self._overrides.items():
            # what somebody else put around ours stays theirs; inside, ours is stock from now on
            if own.get(name) is function:
                del own[name]
                own |= {name: self._before[name]} if name in self._before else {}

    def __enter__(self) -> Handle:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.remove()

    def _last(self) -> Call:
        if self._session.last is None:
            raise PatchError(
                "there is no call with images to report on: none was made yet, or the last one had "
                "no images or failed; call model.generate with pixel_values first"
            )
        return self._session.last

    @property
    def selections(self) -> list[Selection]:
        """One `Selection` per site of the last call, in order; empty if it had no images.

        Indices refer to the LLM tokens of each image in the stock model; those of a cut inside the
        encoder to its patches, as they stand in the pixel input, row by row (crops, tiles,
        frames). `token_selections` has all of them in tokens.
        """
        found, call = self.token_selections, self._session.last
        if found and call is not None and call.encoder is not None:
            found[0] = call.encoder
        return found

    @property
    def plans(self) -> list[LayerPlan]:
        """What the last call's prefill said about decoder layers instead of tokens: one plan, or
        none for methods that say nothing about them and calls that were left alone."""
        return [] if (call := self._session.last) is None else list(call.plans)

    @property
    def token_selections(self) -> list[Selection]:
        """`selections` in LLM tokens throughout."""
        if (call := self._session.last) is None:
            return []
        inside = self.method.site in ("llm_layer", "llm_rows")
        left = self.remaining
        return [*call.earlier, *(left[1:] if inside and (call.later or call.plans) else left)]

    @property
    def remaining(self) -> list[Selection]:
        """What was left of the last call's images, in LLM tokens: where the LLM begins, which is
        everything for a method that acts in it, then behind each of its cuts. Empty if there were
        no images."""
        if (call := self._session.last) is None:
            return []
        return [call.selection, *(call.later[layer] for layer in sorted(call.later))]

    def report(self) -> Report:
        """What the last call kept and cost.

        Raises:
            PatchError: there was none yet, it had no images, or it failed.
        """
        return report_of(self._session, self._last(), self._positions)

    def plot(self, image: Image.Image, group: int = 0) -> Image.Image:
        """The picture with what the last call kept of it; `group` counts the images of the call.

        What decoder layers do with it stands below, and tokens that were found to be attention
        sinks are drawn in color where all are kept.

        Raises:
            PatchError: there was no call with images.
        """
        from vtc.runtime.pictures import picture

        return picture(self._last(), self.remaining, image, group)


def patch(
    model: nn.Module,
    method: str | Method,
    keep: float | int | None = None,
    *,
    positions: Positions = "keep",
    fast: bool | Literal["compile", "eager"] = False,
    kernels: str = "auto",
    seed: int = 0,
    **method_options: Any,
) -> Handle:
    """Compress the visual tokens of a stock transformers model, in place, until the handle is
    removed.

    Args:
        model: e.g. a `LlavaForConditionalGeneration`; of one that PEFT wrapped, the model inside is
            patched.
        method: a name from `vtc.methods()`, or a `Method` object.
        keep: what is kept of each image: a float in (0, 1] is a fraction, an int >= 1 is tokens.
        positions: position ids of what remains: `"keep"` the original ones, `"renumber"` them,
            behind cuts between decoder layers too, `"median"` (merged tokens take their median
            member's), or `"published"`, what the method's official code does.
        fast: capture the encoder, the prefill and the decode steps as CUDA graphs, by size of the
            pixels and by length of the text. What cannot be captured runs as it would without, and
            `report().fast` says why. `"compile"` also compiles them with torch before, which takes
            some seconds for each new size. `"eager"` runs the fast path's code without capture.
        kernels: `"auto"`, `"torch"` or `"triton"`.
        seed: for methods that draw.
        **method_options: options of a method given by name.

    Raises:
        OptionError, UnsupportedModelError, SignalError, PatchError: see `vtc.errors`; the model is
            untouched.
    """
    chosen = build_method(method, **method_options)
    budget = chosen.check_keep(keep)
    if not isinstance(positions, str) or positions not in get_args(Positions):
        raise OptionError(
            f"positions={positions!r} is unknown; expected one of {', '.join(get_args(Positions))}"
        )
    checked(fast)
    if isinstance(seed, bool) or not hasattr(seed, "__index__"):
        raise OptionError(f"seed={seed!r} is a {type(seed).__name__}, expected an int")
    adapter = adapter_of(model)
    kernels = dispatch.checked(kernels, adapter.model.device)
    if (patched := _handle_of(adapter.model)) is not None:
        raise PatchError(
            f"this model is patched already with {patched.method!r}; call vtc.unpatch(model) "
            "first, or handle.set(keep=...) to change the budget"
        )
    session = Session(adapter, chosen, budget, positions, operator.index(seed))
    session.kernels = kernels
    if fast:
        session.fast = Fast(session, fast)
    return Handle(session, positions)


def unpatch(model: nn.Module) -> None:
    """Undo `vtc.patch`; the model is bit-exactly the original again.

    Raises:
        PatchError: the model is not patched.
    """
    handle = _handle_of(stock_of(model))
    if handle is None:
        raise PatchError(
            f"this {type(model).__name__} is not patched; expected one that vtc.patch was called on"
        )
    handle.remove()
