"""`vtc calibrate`: which layers, dimensions and heads matter to visual tokens, as JSON."""

from __future__ import annotations

import argparse
import json
import math
import sys
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

from vtc.calibration import Calibration, calibrate
from vtc.commands import models
from vtc.commands.files import replacing, table
from vtc.commands.samples import Samples, of_folder, of_task, of_testbed
from vtc.errors import InputError, VtcError
from vtc.evaluation.loading import load
from vtc.testbed.model import FAMILIES


def run(args: argparse.Namespace) -> int:
    """Measure, write the file and the picture, print what was found."""
    given = args.model or FAMILIES[0]
    _check_source(args, given)
    name = Path(given).expanduser().resolve().name
    out = args.out or Path(f"vtc_calibration_{name}.json")
    picture = (args.plot or out.with_suffix(".png")) if _draws(args.plot) else None
    models.quiet()
    with ExitStack() as stack:
        temporary = stack.enter_context(replacing(out))
        drawn = None if picture is None else stack.enter_context(replacing(picture))
        loaded = load(models.name_of(args.model), args.device, dtype=args.dtype)
        samples = _samples(args, loaded.processor)
        found = calibrate(
            loaded.model, samples, what=args.what, progress=sys.stderr.isatty() and not args.json
        )
        # a name that means the same on another machine
        found = replace(found, model=name if Path(given).is_dir() else given, source=samples.source)
        found.save(temporary)
        if drawn is not None:
            drawn.write_bytes(_drawn(found))
    written = {"out": str(out), "picture": None if picture is None else str(picture)}
    print(json.dumps(found.to_dict() | written, indent=2) if args.json else _page(found, written))
    return 0


def _check_source(args: argparse.Namespace, model: str) -> None:
    """Refuse samples that are named twice, by half or not at all."""
    if (args.images is None) != (args.question is None):
        raise InputError(
            "--images and --question belong together: name a folder of pictures and the question "
            "to ask about each"
        )
    if args.task is not None and args.images is not None:
        raise InputError("got --task and --images, expected one of them: leave one out")
    if args.include_path is not None and args.task is None:
        raise InputError("--include-path came without --task, expected both: add --task NAME")
    if args.task is None and args.images is None and model not in FAMILIES:
        raise InputError(
            f"nothing to calibrate {model!r} with, expected --task NAME, or --images FOLDER with "
            "--question '...' (models of the testbed have scenes of their own)"
        )


def _samples(args: argparse.Namespace, processor: Any) -> Samples:
    if args.task is not None:
        return of_task(processor, args.task, args.include_path, args.samples)
    if args.images is not None:
        return of_folder(processor, args.images, args.question, args.samples)
    return of_testbed(processor, args.samples)


def _draws(plot: Path | None) -> bool:
    """Whether a picture can be drawn; one that was asked for must be."""
    if plot is not None and plot.suffix.lower() != ".png":
        raise InputError(f"--plot {str(plot)!r} ends in {plot.suffix!r}, expected .png: rename it")
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        if plot is not None:
            raise VtcError(
                "matplotlib is not installed, expected the eval extra for --plot; "
                "pip install 'visual-token-compression[eval]'"
            ) from None
        return False
    return True


def _drawn(found: Calibration) -> bytes:
    from vtc.calibration.figure import picture

    return picture(found)


def _page(found: Calibration, written: dict[str, str | None]) -> str:
    lines = [f"{found.model}: {found.source}", "", table(_rows(found)), ""]
    if found.layer_contribution is not None:
        scores = found.layer_contribution
        order = sorted(range(len(scores)), key=scores.__getitem__)
        lines.append("layers, lowest contribution first  " + " ".join(map(str, order)))
    if found.activations is not None:
        layer, dim, phi = found.activations.strongest
        dims = " ".join(map(str, found.sink_dims or ())) or "none"
        lines.append(
            f"sink dimensions  {dims} (largest activation {phi:.2f} x RMS in dimension {dim}, "
            f"layer {layer}; tau {found.activations.tau:g})"
        )
    lines += [f"{name}  {path}" for name, path in written.items() if path is not None]
    return "\n".join(lines)


def _rows(found: Calibration) -> list[list[str]]:
    """A line for each layer, of what was measured."""
    columns: list[list[str]] = []
    if found.layer_contribution is not None:
        errors = found.contribution_error or (math.nan,) * len(found.layer_contribution)
        pairs = zip(found.layer_contribution, errors, strict=True)
        columns.append(["contribution", *(_with_error(*pair) for pair in pairs)])
    if (peaks := found.activations) is not None:
        for name, values in (
            ("first token", peaks.first),
            ("other text", peaks.text),
            ("visual", peaks.visual),
        ):
            columns.append([name, *(f"{v:.2f}" for v in values)])
    if found.head_ratio is not None:
        spans = (f"{min(row):.3g} to {max(row):.3g}" for row in found.head_ratio)
        columns.append(["ratio of heads", *spans])
    layers = ["layer", *map(str, range(len(columns[0]) - 1))]
    return [list(row) for row in zip(layers, *columns, strict=True)]


def _with_error(value: float, error: float) -> str:
    return f"{value:.2e}" + ("" if math.isnan(error) else f" ± {error:.0e}")
