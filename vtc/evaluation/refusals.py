"""What models refuse, said before anything is run."""

from __future__ import annotations

from collections.abc import Sequence

from vtc.errors import OptionError, SignalError, UnsupportedModelError
from vtc.evaluation.cells import distinct
from vtc.evaluation.compression import FULL, Compression
from vtc.evaluation.loading import Loaded
from vtc.evaluation.models import Models

_REFUSALS = (SignalError, OptionError, UnsupportedModelError)


def offered(
    compressions: Sequence[Compression], models: Models
) -> tuple[dict[str, list[Compression]], list[str]]:
    """What is run of each model, and a sentence for each method that is not, or not at all keeps.

    Raises:
        SignalError, OptionError, UnsupportedModelError: a model cannot be patched at all, or a
            method works on none of the models.
    """
    found: dict[str, list[Compression]] = {}
    refused: dict[tuple[str, str], Exception] = {}
    notes: list[str] = []
    for name, loaded in models.items():
        own = []
        for compression in compressions:
            if (error := _refusal(compression, loaded)) is None:
                own.append(compression)
            elif compression.method == FULL:
                raise error
            else:
                refused.setdefault((compression.label, name), error)
        found[name], same = distinct(own, _depth(loaded))
        notes += [f"{name}: {note}" if len(models) > 1 else note for note in same]
    run = {compression.label for own in found.values() for compression in own}
    for (label, name), error in refused.items():
        # in a sweep of one model, whatever it refuses is a mistake
        if label not in run or len(models) == 1:
            raise error
        notes.append(f"{name}: {label} not run, because {' '.join(str(error).split())}")
    return found, notes


def _refusal(compression: Compression, loaded: Loaded) -> Exception | None:
    """Patch once: what a model refuses comes up then."""
    try:
        with compression.patch(loaded.model):
            return None
    except _REFUSALS as error:
        return error


def _depth(loaded: Loaded) -> int:
    """Decoder layers of the model."""
    from vtc.adapters.registry import adapter_of

    return len(adapter_of(loaded.model).language_model.layers)  # type: ignore[arg-type]
