"""A calibration as data: which layers matter to visual rows, where sinks show, which heads look."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from vtc.calibration import store
from vtc.calibration.activations import Activations
from vtc.calibration.published import published
from vtc.errors import InputError, OptionError, SignalError
from vtc.sites import Facts

FILE = "vtc_calibration.json"
_MEANT = {
    "layer_contribution": "layers",
    "sink_dims": "sinks",
    "head_ratio": "heads",
}


@dataclass(frozen=True)
class Calibration:
    """What was found about one language model.

    Attributes:
        model: the folder or hub id it was measured on.
        layer_contribution: per decoder layer, KL(frozen ‖ normal) of the last prompt token's
            next-token distributions in nats, mean over samples, when visual rows are frozen in that
            layer (ShortV's LC score); of a published order, the place in it, and infinity for
            layers that it does not name. None: not measured.
        sink_dims: dimensions of the residual stream in which attention sinks show; empty: none
            does. None: not measured.
        head_ratio: per decoder layer and head, the threshold below which YOPO's rule counts the
            head as one that reads visual tokens; None: not measured.
        samples: how many samples were looked at.
        source: what they were, or where the numbers were published.
        contribution_error: standard errors of `layer_contribution`; None: unknown.
        activations: what `sink_dims` was decided by; None: unknown.
    """

    model: str = ""
    layer_contribution: tuple[float, ...] | None = None
    sink_dims: tuple[int, ...] | None = None
    head_ratio: tuple[tuple[float, ...], ...] | None = None
    samples: int = 0
    source: str = ""
    contribution_error: tuple[float, ...] | None = None
    activations: Activations | None = None

    @classmethod
    def load(cls, path: str | Path) -> Calibration:
        """The calibration in a file, or in the folder's file of the usual name.

        Raises:
            InputError: there is no such file, or it holds something else.
        """
        path = Path(path).expanduser()
        found = store.read(path / FILE if path.is_dir() else path)
        activations = found.pop("activations", None)
        if activations is not None:
            found["activations"] = Activations(**activations)
        return cls(**found)

    def save(self, path: str | Path) -> None:
        """Write it as JSON, infinity as null; what is there is replaced.

        Raises:
            InputError: the folder does not exist, or `path` is one.
        """
        path = Path(path).expanduser()
        if path.is_dir() or not path.parent.is_dir():
            raise InputError(
                f"cannot write {str(path)!r}, expected a file in a folder that exists: create the "
                "folder, or add a file name"
            )
        path.write_text(store.text(self.to_dict()), encoding="utf-8")

    def to_dict(self) -> dict[str, Any]:
        """What is known, as JSON can hold it."""
        known = {name: value for name, value in asdict(self).items() if value is not None}
        return store.plain(known)


def calibration_of(given: Calibration | str | Path | None, facts: Facts, what: str) -> Calibration:
    """The calibration that holds `what` (the name of an attribute) for a model.

    Args:
        given: a calibration, its file, or a folder that holds one; None: what is published for this
            language model, else the file beside its weights.
        facts: of the model.
        what: `"layer_contribution"`, `"sink_dims"` or `"head_ratio"`.

    Raises:
        SignalError: there is none, it lacks `what`, or it is one of another model.
    """
    found = _found(given, facts, what)
    if getattr(found, what) is None:
        raise SignalError(
            f"the calibration of {found.model or 'an unnamed model'!r} holds no {what}, which this "
            f"method needs: {_fix(facts, what)}"
        )
    _check_fit(found, facts, what)
    return found


def _found(given: object, facts: Facts, what: str) -> Calibration:
    if isinstance(given, Calibration):
        return given
    if isinstance(given, str | Path):
        return Calibration.load(given)
    if given is not None:
        raise OptionError(
            f"calibration={given!r} is a {type(given).__name__}, expected a vtc.Calibration, its "
            "file or the folder that holds one"
        )
    known = Calibration(**published(facts))
    if getattr(known, what) is not None:
        return known
    if facts.name and (beside := Path(facts.name).expanduser() / FILE).is_file():
        return Calibration.load(beside)
    raise SignalError(
        f"no {what} is known for {_model(facts)}: none is published and there is no {FILE} beside "
        f"its weights; {_fix(facts, what)}"
    )


def _model(facts: Facts) -> str:
    named = f"model {facts.name!r}" if facts.name else "this model"
    return f"{named} ({facts.llm_kind}, {facts.llm_depth} layers of width {facts.llm_width})"


def _fix(facts: Facts, what: str) -> str:
    name = facts.name or "MODEL"
    return (
        f"measure it with `vtc calibrate --model {name} --what {_MEANT.get(what, what)} ...` or "
        "vtc.calibrate and pass calibration="
    )


def _check_fit(found: Calibration, facts: Facts, what: str) -> None:
    """Refuse numbers that cannot be of this language model."""
    got = expected = ""
    if what == "layer_contribution" and found.layer_contribution is not None:
        got = f"{len(found.layer_contribution)} layers"
        expected = f"{facts.llm_depth} layers"
    if what == "head_ratio" and found.head_ratio is not None:
        heads = sorted({len(row) for row in found.head_ratio})
        got = f"{len(found.head_ratio)} layers of {'/'.join(map(str, heads))} heads"
        expected = f"{facts.llm_depth} layers of {facts.llm_heads} heads"
    if what == "sink_dims" and found.sink_dims:
        outside = not 0 <= min(found.sink_dims) <= max(found.sink_dims) < facts.llm_width
        got = f"dimensions {list(found.sink_dims)}" if outside else ""
        expected = f"dimensions below {facts.llm_width}" if outside else ""
    if got != expected:
        raise SignalError(
            f"the calibration of {found.model or 'an unnamed model'!r} holds {what} for {got}, "
            f"expected {expected} as {_model(facts)} has: {_fix(facts, what)}"
        )
