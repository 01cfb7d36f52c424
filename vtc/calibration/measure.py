"""`vtc.calibrate`: look at a few prompts with the stock model and say what methods must know."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from vtc.adapters.base import Adapter
from vtc.adapters.registry import adapter_of
from vtc.calibration.activations import (
    Peaks,
    mean_peaks,
    rounded,
    sink_dims,
    summary,
    watching,
)
from vtc.calibration.data import Calibration
from vtc.calibration.heads import head_threshold, reading_heads
from vtc.calibration.layers import contributions
from vtc.calibration.prompt import read_prompt
from vtc.errors import InputError, OptionError, PatchError, VtcError

WHAT = ("layers", "sinks", "heads")


@dataclass(frozen=True, eq=False)
class _Seen:
    """What one sample showed, as far as it was asked for."""

    contribution: Tensor | None = None
    peaks: Peaks | None = None
    ratios: Tensor | None = None


def calibrate(
    model: nn.Module,
    samples: Iterable[Any],
    *,
    what: str | Sequence[str] = WHAT,
    progress: bool = True,
) -> Calibration:
    """Measure what methods must know about a model, which stays as it is.

    Args:
        model: a stock transformers model that is not patched, on any device in any precision.
        samples: what its processor returns for single prompts with images; each is looked at once.
        what: `"layers"` (ShortV's LC score, L + 1 runs of the language model for each sample),
            `"sinks"` (dimensions of massive activations) and `"heads"` (YOPO's ratio).
        progress: show a bar.

    Raises:
        OptionError: `what` names something else.
        InputError: there are no samples, or one has no images or no text behind them.
        PatchError: the model is patched.
    """
    chosen = _chosen(what)
    adapter = adapter_of(model)
    if "_vtc_handle" in vars(adapter.model):
        raise PatchError(
            "this model is patched, expected a stock one: call vtc.unpatch(model) before "
            "vtc.calibrate"
        )
    if isinstance(samples, dict):
        raise InputError("samples is one mapping, expected a list of them: pass [inputs]")
    seen = list[_Seen]()
    for i, sample in enumerate(tqdm(samples, desc="calibrating", disable=not progress)):
        try:
            with torch.no_grad():
                seen.append(_look(adapter, sample, chosen))
        except InputError as error:
            raise InputError(f"sample {i}: {error}") from error
    if not seen:
        raise InputError("there are no samples, expected at least one processor output")
    return _told(adapter.model.config._name_or_path or "", seen)


def _chosen(what: str | Sequence[str]) -> tuple[str, ...]:
    names = (what,) if isinstance(what, str) else tuple(what)
    if not names or any(name not in WHAT for name in names):
        raise OptionError(f"what={what!r}, expected one or more of {', '.join(WHAT)}")
    return names


def _look(adapter: Adapter, sample: object, what: tuple[str, ...]) -> _Seen:
    prompt = read_prompt(adapter, sample)
    with ExitStack() as stack:
        peaks = stack.enter_context(watching(prompt)) if "sinks" in what else None
        ratios = stack.enter_context(reading_heads(prompt)) if "heads" in what else None
        normal = prompt.log_probabilities()
    if not normal.isfinite().all():
        raise VtcError(
            f"the model's answer to a sample is not finite in {adapter.model.dtype}, expected "
            "numbers: load it with another dtype, such as bfloat16"
        )
    return _Seen(contributions(prompt, normal) if "layers" in what else None, peaks, ratios)


def _told(name: str, seen: Sequence[_Seen]) -> Calibration:
    found: dict[str, Any] = {}
    if scores := [s.contribution for s in seen if s.contribution is not None]:
        every = torch.stack(scores)  # [n, L]
        found["layer_contribution"] = rounded(every.mean(0))
        if len(every) > 1:
            found["contribution_error"] = rounded(every.std(0) / len(every) ** 0.5)
    if peaks := [s.peaks for s in seen if s.peaks is not None]:
        mean = mean_peaks(peaks)
        found |= {"sink_dims": sink_dims(mean.first), "activations": summary(mean)}
    if ratios := [s.ratios for s in seen if s.ratios is not None]:
        found["head_ratio"] = tuple(rounded(row) for row in head_threshold(torch.stack(ratios)))
    source = f"measured on {len(seen)} samples"
    return Calibration(model=name, samples=len(seen), source=source, **found)
