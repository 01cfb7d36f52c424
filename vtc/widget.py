"""A picture, a question and a slider: drag `keep`, see tokens vanish and the answer change.

Needs ipywidgets (the extra `notebook`), which is imported when `explore` is called.
"""

from __future__ import annotations

import asyncio
import io
from base64 import b64encode
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from html import escape
from types import ModuleType
from typing import Any

import torch
from PIL import Image

import vtc
from vtc import viz
from vtc.errors import InputError, OptionError, VtcError
from vtc.methods.base import Method
from vtc.methods.registry import method as build_method

# close to one factor between neighbors: answers change most where little is left
KEEPS = (0.02, 0.03, 0.04, 0.055, 0.08, 0.11, 0.15, 0.22, 0.33, 0.5, 0.7, 1.0)
START = 0.22
# seconds that a slider must rest before an answer is computed
REST = 0.3
NEW_TOKENS = 16


@dataclass(frozen=True)
class Shown:
    """What the widget shows of one method and budget.

    Attributes:
        answer: of the compressed model.
        tokens: how much was kept, in words.
        picture: a PNG with what was kept.
    """

    answer: str
    tokens: str
    picture: bytes


def explore(
    model: Any,
    processor: Any,
    image: Image.Image,
    question: str,
    *,
    methods: Sequence[str | Method] | None = None,
    evidence: Iterable[viz.Box] = (),
    **generation: Any,
) -> Explorer:
    """A widget for a notebook: choose a method, drag `keep`, and read the answer.

    Each answer is computed once, when the slider has rested; those that are known appear while it
    is dragged. The model is patched for the time of an answer and stock in between.

    Args:
        model: a stock model, not patched.
        processor: the model's.
        image: one picture.
        question: about it, without a chat template.
        methods: names or `Method` objects to choose from; None: all that are registered.
        evidence: boxes (x0, y0, x1, y1) in pixels of `image`, outlined.
        **generation: for `model.generate`; by default 16 new tokens, greedy.

    Raises:
        InputError: the processor refuses the question.
        OptionError: a method does not exist, or there is none.
        VtcError: ipywidgets is not installed.
    """
    chosen = [build_method(m) for m in (vtc.methods() if methods is None else methods)]
    if not chosen:
        raise OptionError("methods=[]: expected at least one name of vtc.methods() or None for all")
    greedy = {"max_new_tokens": NEW_TOKENS, "do_sample": False}
    asked = Asked(model, processor, image, question, tuple(evidence), greedy | generation)
    return Explorer(asked, chosen)


class Asked:
    """One question about one picture, answered by a patched model as often as needed."""

    def __init__(
        self,
        model: Any,
        processor: Any,
        image: Image.Image,
        question: str,
        evidence: tuple[viz.Box, ...],
        generation: dict[str, Any],
    ) -> None:
        self.question = question
        self._model, self._processor, self._generation = model, processor, generation
        self._seen = viz.as_seen(image, processor)
        # a processor that crops moves the picture under the boxes
        self._evidence = evidence if self._seen.size == image.size else ()
        content = [{"type": "image"}, {"type": "text", "text": question}]
        chat = [{"role": "user", "content": content}]
        try:
            prompt = processor.apply_chat_template(chat, add_generation_prompt=True)
            inputs = processor(images=image, text=prompt, return_tensors="pt")
        except ValueError as error:
            raise InputError(
                f"the processor refused the question {question!r} ({error}), expected plain text "
                "about one picture: write it without special tokens"
            ) from None
        self._inputs = inputs.to(model.device, dtype=model.dtype)

    def answer(self) -> str:
        """What the model says as it is."""
        with torch.no_grad():
            out = self._model.generate(**self._inputs, **self._generation)
        new = out[0, self._inputs["input_ids"].shape[1] :]
        text: str = self._processor.decode(new, skip_special_tokens=True)
        return text.strip()

    def compressed(self, method: Method, keep: float | None) -> Shown:
        """What it says under a method and how much of the picture that saw."""
        with vtc.patch(self._model, method, keep) as handle:
            answer = self.answer()
            return Shown(answer, _tokens(handle.report()), _png(self._drawn(handle)))

    def _drawn(self, handle: vtc.Handle) -> Image.Image:
        if handle.plans:
            return handle.plot(self._seen)
        return viz.overlay(self._seen, viz.last_left(handle.remaining), evidence=self._evidence)


class Explorer:
    """The widget of `explore`; show it by making it the last line of a cell.

    Attributes:
        method: the menu; its value is a `Method`.
        keep: the slider; its value is one of `KEEPS`. Not in use for methods that decide by
            themselves how much they keep.
        picture: the picture with what is kept, or as it is until something was answered.
        status: the answers, or what went wrong, as HTML.
        view: all of it.
    """

    def __init__(self, asked: Asked, methods: Sequence[Method]) -> None:
        w = _ipywidgets()
        self._asked = asked
        self._known: dict[tuple[Method, float | None], Shown] = {}
        self._full: str | None = None
        self._timer: asyncio.TimerHandle | None = None
        self.method = w.Dropdown(options=_labeled(methods), description="method")
        self.keep = w.SelectionSlider(
            options=[(f"{100 * k:g} %", k) for k in KEEPS],
            value=START,
            description="keep",
            continuous_update=True,
            layout=w.Layout(width="24em"),
        )
        self.status = w.HTML()
        self.picture = w.Image(value=_png(asked._seen), format="png")
        self.picture.layout = w.Layout(max_width="100%", object_fit="contain")
        question = w.HTML(f"<b>{escape(asked.question)}</b>")
        controls = w.HBox([self.method, self.keep], layout=w.Layout(flex_flow="row wrap"))
        self.view = w.VBox([question, controls, self.status, self.picture])
        self.method.observe(self._changed, "value")
        self.keep.observe(self._changed, "value")
        self.refresh()

    def refresh(self) -> None:
        """Show what is chosen now, computing the answer if it is not known yet."""
        self._stop_waiting()
        method, keep = self._chosen()
        self.keep.disabled = keep is None
        if (shown := self._known.get((method, keep))) is None:
            self._say("answering …")
            try:
                shown = self._answered(method, keep)
            except Exception as error:  # whatever it is: nothing else would show it
                self._say(f"{type(error).__name__}: {error}", "#b00020")
                return
        self.picture.value = shown.picture
        changed = shown.answer != self._full
        self._say(
            f"{shown.answer}   ({'all tokens: ' + str(self._full) if changed else 'as with all'}; "
            f"{shown.tokens})",
            "#b00020" if changed else "#1b5e20",
        )

    def _answered(self, method: Method, keep: float | None) -> Shown:
        if self._full is None:
            self._full = self._asked.answer()
        shown = self._known[method, keep] = self._asked.compressed(method, keep)
        return shown

    def _chosen(self) -> tuple[Method, float | None]:
        method: Method = self.method.value
        return method, None if method.count == "adaptive" else self.keep.value

    def _changed(self, change: Any) -> None:
        self._stop_waiting()
        try:
            loop = asyncio.get_running_loop()
        except RuntimeError:
            loop = None
        # known answers cost nothing; without an event loop nothing could be done later
        if loop is None or self._chosen() in self._known:
            self.refresh()
            return
        self._say("…")
        self._timer = loop.call_later(REST, self.refresh)

    def _stop_waiting(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _say(self, text: str, color: str = "inherit") -> None:
        self.status.value = f'<span style="color:{color}">{escape(text)}</span>'

    def _repr_mimebundle_(self, **kwargs: Any) -> dict[str, Any]:
        bundle = self.view._repr_mimebundle_(**kwargs)
        # where no kernel runs, a picture still says what the widget is about
        return {"image/png": b64encode(self.picture.value).decode(), **(bundle or {})}


def _ipywidgets() -> ModuleType:
    try:
        import ipywidgets
    except ImportError as error:
        raise VtcError(
            f"the widget needs ipywidgets ({error}), expected it installed: "
            'pip install "visual-token-compression[notebook]"'
        ) from None
    found: ModuleType = ipywidgets
    return found


def _labeled(methods: Sequence[Method]) -> list[tuple[str, Method]]:
    """Each with its name, or with its options where two have the same name."""
    names = [m.name for m in methods]
    return [(m.name if names.count(m.name) == 1 else repr(m), m) for m in methods]


def _tokens(report: Any) -> str:
    kept, n = sum(report.kept_tokens), sum(report.visual_tokens)
    words = f"{kept} of {n} visual tokens, {100 * kept / n:.0f} %"
    if abs(report.layer_mean_tokens - kept) < 0.5:
        return words
    return f"{words}; {report.layer_mean_tokens:.0f} at work in an average decoder layer"


def _png(image: Image.Image) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()
