"""`vtc.patch`, `vtc.unpatch` and the handle that undoes everything."""

from __future__ import annotations

import functools
from types import TracebackType
from typing import TYPE_CHECKING, Any, get_args

from torch import nn

from vtc import ops
from vtc.adapters.registry import adapter_of
from vtc.errors import OptionError, PatchError, UnsupportedModeError
from vtc.methods.base import Method, Positions
from vtc.methods.registry import method as build_method
from vtc.runtime.forward import ForwardSeam
from vtc.runtime.generate import GenerateSeam
from vtc.runtime.report import Report, report_of
from vtc.runtime.session import Call, Session
from vtc.types import Selection

if TYPE_CHECKING:
    from PIL import Image


def _handle_of(model: object) -> Handle | None:
    """The handle of a patched model; it lives on the override, so that it dies with the model."""
    handle = getattr(getattr(model, "__dict__", {}).get("generate"), "vtc_handle", None)
    return handle if isinstance(handle, Handle) and handle._model is model else None


class Handle:
    """A patched model. A context manager: leaving it removes the patch, also after an exception.

    Attributes:
        method: the method in force.
        plans: decisions over layers of the last call, for methods that skip work instead of
            dropping tokens.
    """

    def __init__(self, session: Session, positions: Positions, kernels: str) -> None:
        self.method = session.method
        self.plans: list[Any] = []
        self._session = session
        self._positions = positions
        self._kernels = kernels
        self._model: Any = session.adapter.model
        self._forward = ForwardSeam(session)
        self._before: dict[str, Any] = {}
        stock = self._model.generate
        seam = GenerateSeam(session, stock, self._forward)

        # pipelines inspect the signature, so the override keeps the stock one
        @functools.wraps(stock)
        def generate(*args: Any, **kwargs: Any) -> Any:
            return seam(*args, **kwargs)

        @functools.wraps(self._model.generate_batch)
        def generate_batch(*args: Any, **kwargs: Any) -> Any:
            raise UnsupportedModeError(
                "generate_batch (continuous batching) was called on a patched model, expected "
                "generate: it would run uncompressed; vtc.unpatch(model) first"
            )

        generate.vtc_handle = self  # type: ignore[attr-defined]
        self._override("generate", generate)
        self._override("generate_batch", generate_batch)

    def _override(self, name: str, function: Any) -> None:
        if name in vars(self._model):
            self._before[name] = vars(self._model)[name]
        setattr(self._model, name, function)

    def set(self, *, keep: float | int) -> None:
        """Change the budget without patching again.

        Raises:
            OptionError: `keep` is out of range, or the method takes none.
        """
        self._session.budget = self.method.check_keep(keep)

    def remove(self) -> None:
        """Undo the patch; doing it twice is fine. Reports and selections stay readable."""
        if _handle_of(self._model) is not self:
            return
        self._forward.detach()
        for name in ("generate", "generate_batch"):
            vars(self._model).pop(name, None)
        vars(self._model).update(self._before)

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
                "there is no call with images to report on yet; call model.generate or "
                "model.forward first"
            )
        return self._session.last

    @property
    def selections(self) -> list[Selection]:
        """One `Selection` per site of the last call with images, in order; else empty."""
        return [self._session.last.selection] if self._session.last else []

    def report(self) -> Report:
        """What the last call with images kept and cost.

        Raises:
            PatchError: there was none yet.
        """
        return report_of(self._session, self._last(), self._positions, self._kernels)

    def plot(self, image: Image.Image, group: int = 0) -> Image.Image:
        """The picture with what the last call kept of it; `group` counts the images of the call."""
        from vtc import viz

        return viz.overlay(image, self._last().selection, group=group)


def patch(
    model: nn.Module,
    method: str | Method,
    keep: float | int | None = None,
    *,
    positions: Positions = "keep",
    fast: bool = False,
    kernels: str = "auto",
    seed: int = 0,
    **method_options: Any,
) -> Handle:
    """Compress the visual tokens of a stock transformers model, in place, until the handle is
    removed.

    Args:
        model: e.g. a `LlavaForConditionalGeneration`.
        method: a name from `vtc.methods()`, or a `Method` object.
        keep: what is kept of each image: a float in (0, 1] is a fraction, an int >= 1 is tokens.
        positions: position ids of what remains: `"keep"` the original ones, `"renumber"` them,
            `"median"` (merged tokens take their median member's), or `"published"`, what the
            method's official code does.
        fast: run the captured fast path; not available in this version.
        kernels: `"auto"`, `"torch"` or `"triton"`.
        seed: for methods that draw.
        **method_options: options of a method given by name.

    Raises:
        OptionError, UnsupportedModelError, SignalError, PatchError: see `vtc.errors`; the model is
        untouched.
    """
    chosen = build_method(method, **method_options)
    budget = chosen.check_keep(keep)
    if positions not in get_args(Positions):
        raise OptionError(
            f"positions={positions!r} is unknown; expected one of {', '.join(get_args(Positions))}"
        )
    if fast:
        raise OptionError(
            "fast=True was asked for, but this version has no fast path; pass fast=False"
        )
    if isinstance(seed, bool) or not isinstance(seed, int):
        raise OptionError(f"seed={seed!r} is a {type(seed).__name__}, expected an int")
    backend = ops.choose_backend(kernels)
    adapter = adapter_of(model)
    if (patched := _handle_of(model)) is not None:
        raise PatchError(
            f"this model is patched already with {patched.method!r}; call vtc.unpatch(model) "
            "first, or handle.set(keep=...) to change the budget"
        )
    policy = chosen.published_positions if positions == "published" else positions
    session = Session(adapter, chosen, budget, policy, seed)
    return Handle(session, positions, backend)


def unpatch(model: nn.Module) -> None:
    """Undo `vtc.patch`; the model is bit-exactly the original again.

    Raises:
        PatchError: the model is not patched.
    """
    handle = _handle_of(model)
    if handle is None:
        raise PatchError(
            f"this {type(model).__name__} is not patched; expected one that vtc.patch was called on"
        )
    handle.remove()
