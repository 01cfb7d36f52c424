"""The files of a sweep: CSV, JSON, plot and one HTML page that needs nothing else."""

from __future__ import annotations

import base64
import csv
import io
import math
from collections.abc import Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pandas as pd

from vtc.evaluation import findings, printed, store
from vtc.evaluation.compression import FULL
from vtc.evaluation.figures import Plot, accuracy_plot, active_plot, time_plot
from vtc.evaluation.loading import Loaded
from vtc.evaluation.pictures import examples, layer_pictures, rows_to_show
from vtc.evaluation.statistics import RESAMPLES, SEED
from vtc.evaluation.table import Row

if TYPE_CHECKING:
    from vtc.evaluation.sweep import SweepConfig, SweepResult


def write_outputs(
    config: SweepConfig,
    result: SweepResult,
    loaded: Loaded,
    tasks: Sequence[Any],
    environment: Mapping[str, str],
) -> None:
    """Write `table.csv`, `table.json`, the figures and `report.html`."""
    out = config.out
    store.write(out / "table.csv", _csv(result.rows))
    content = {
        "rows": result.rows,
        "summary": result.summary,
        "notes": list(result.notes),
        "environment": dict(environment),
    }
    store.write(out / "table.json", store.to_json(content))
    chance = {
        task: value for task in config.tasks if (value := _chance(result.samples, task)) is not None
    }
    plots = _plots(result.summary, chance, _machine(loaded, environment))
    for name, plot in plots.items():
        for ending, data in plot.items():
            store.write(out / f"{name}.{ending}", data)
    pictures = [
        example
        for task in tasks
        for example in examples(result.samples, result.summary, loaded, task, config.pictures)
    ]
    layers = [
        shown
        for task in tasks[:1]
        for shown in layer_pictures(result.samples, result.summary, loaded, task)
    ]
    shown = {"pictures": pictures, "layers": layers, "parameters": _size(loaded)}
    store.write(out / "report.html", _page(config, result, plots, shown, environment, chance))


def _plots(summary: Sequence[Row], chance: Mapping[str, float], machine: str) -> dict[str, Plot]:
    found = {
        "accuracy": accuracy_plot(summary, chance),
        "accuracy_active": active_plot(summary, chance),
        "accuracy_time": time_plot(summary, chance, machine),
    }
    return {name: plot for name, plot in found.items() if plot is not None}


def _machine(loaded: Loaded, environment: Mapping[str, str]) -> str:
    """What ran the model, as a figure names it."""
    if loaded.model.device.type == "cuda":
        return environment.get("gpu", "a GPU")
    threads = int(environment["threads"])
    return f"{environment['cpu']}, {threads} thread{'s' if threads > 1 else ''}"


def _size(loaded: Loaded) -> str:
    """Parameters in words: 3.8 million, 7.1 billion."""
    count = sum(p.numel() for p in loaded.model.parameters())
    return f"{count / 1e9:.1f} billion" if count >= 1e9 else f"{count / 1e6:.1f} million"


def _csv(rows: Sequence[Row]) -> str:
    columns = list(dict.fromkeys(name for row in rows for name in row))
    buffer = io.StringIO()
    writer = csv.DictWriter(buffer, columns, restval="", lineterminator="\n")
    writer.writeheader()
    for row in rows:
        options = " ".join(f"{key}={value}" for key, value in row["options"].items())
        writer.writerow({**row, "options": options})
    return buffer.getvalue()


def _chance(frame: pd.DataFrame, task: str) -> float | None:
    """Accuracy by guessing on these questions; known for the testbed only."""
    from vtc.testbed import KINDS

    kinds = frame[(frame["task"] == task) & (frame["label"] == FULL)]["kind"]
    values = [KINDS[kind] for kind in kinds if kind in KINDS]
    return sum(values) / len(values) if values and len(values) == len(kinds) else None


def _page(
    config: SweepConfig,
    result: SweepResult,
    plots: Mapping[str, Plot],
    shown: Mapping[str, Any],
    environment: Mapping[str, str],
    chance: Mapping[str, float],
) -> str:
    import jinja2

    text = resources.files("vtc.evaluation").joinpath("templates", "report.html.j2").read_text()
    template = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined).from_string(
        text
    )
    full = [row for row in result.summary if row["method"] == FULL]
    return template.render(
        model=_model_name(config.model),
        command=config.command,
        config=config,
        tasks=[_task(result, row["task"]) for row in full],
        full=full,
        chance=chance,
        plots={name: _uri(plot["svg"]) for name, plot in plots.items()},
        # without methods that act in the LLM the second figure is the first
        inside=any(
            abs(row["active_fraction"] - row["kept_fraction"]) > 1e-6 for row in result.summary
        ),
        columns=printed.COLUMNS,
        notes=[printed.short(note) for note in result.notes],
        **shown,
        losses=findings.losses(result.samples, result.summary),
        bends=findings.bends(result.samples, result.summary),
        environment=environment,
        timed=max((row["n_timed"] for row in result.rows), default=0),
        resamples=RESAMPLES,
        seed=SEED,
        percent=printed.percent,
    )


def _uri(svg: bytes) -> str:
    return "data:image/svg+xml;base64," + base64.b64encode(svg).decode()


def _task(result: SweepResult, task: str) -> dict[str, Any]:
    rows = [row for row in result.summary if row["task"] == task]
    labels = [row["label"] for row in rows]
    return {
        "name": task,
        "rows": [
            {"cells": printed.cells(row), "starts": label != before, "strong": label == FULL}
            for row, label, before in zip(rows, labels, [None, *labels], strict=False)
        ],
        "kinds": _kinds(rows_to_show(result.summary, task)),
    }


def _model_name(model: str) -> str:
    """A hub id as it is, a folder by its name: where it lies is nobody else's business."""
    from vtc.testbed import model_folder

    folder = Path(model).expanduser()
    if not folder.is_dir():
        return model
    name = folder.resolve().name
    return f"{name} of the testbed" if folder.resolve() == model_folder().resolve() else name


def _kinds(rows: Sequence[Row]) -> dict[str, Any] | None:
    """Accuracy by kind of question, each with a shade between white (0) and green (1)."""
    names = [key for key in rows[0] if key.startswith("accuracy_")] if rows else []
    names = [key for key in names if key not in ("accuracy_low", "accuracy_high")]
    if not names:
        return None
    return {
        "names": [key.removeprefix("accuracy_").replace("_", " ") for key in names],
        "rows": [
            {
                "name": printed.name(row),
                "kept": printed.percent(row["kept_fraction"], 1),
                "active": printed.percent(row["active_fraction"], 1),
                "cells": [_shade(row.get(key)) for key in names],
            }
            for row in rows
        ],
    }


def _shade(value: float | None) -> tuple[str, str]:
    if value is None or math.isnan(value):
        return "", "#fff"
    white, green = (255, 255, 255), (0, 158, 115)
    mix = [round(w + 0.75 * value * (g - w)) for w, g in zip(white, green, strict=True)]
    return f"{100 * value:.0f}", "#{:02x}{:02x}{:02x}".format(*mix)
