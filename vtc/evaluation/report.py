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
from vtc.evaluation.figures import accuracy_plot
from vtc.evaluation.loading import Loaded
from vtc.evaluation.pictures import examples, rows_to_show
from vtc.evaluation.statistics import RESAMPLES, SEED
from vtc.evaluation.table import FULL, Row

if TYPE_CHECKING:
    from vtc.evaluation.sweep import SweepConfig, SweepResult


def write_outputs(
    config: SweepConfig,
    result: SweepResult,
    loaded: Loaded,
    tasks: Sequence[Any],
    environment: Mapping[str, str],
) -> None:
    """Write `table.csv`, `table.json`, `accuracy.png`, `accuracy.svg` and `report.html`."""
    out = config.out
    store.write(out / "table.csv", _csv(result.rows))
    content = {"rows": result.rows, "summary": result.summary, "environment": dict(environment)}
    store.write(out / "table.json", store.to_json(content))
    chance = {
        task: value for task in config.tasks if (value := _chance(result.samples, task)) is not None
    }
    plot = accuracy_plot(result.summary, chance)
    for ending, data in plot.items():
        store.write(out / f"accuracy.{ending}", data)
    pictures = [
        example
        for task in tasks
        for example in examples(result.samples, result.summary, loaded, task, config.pictures)
    ]
    page = _page(config, result, plot["svg"], pictures, environment, chance)
    store.write(out / "report.html", page)


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
    plot: bytes,
    pictures: Sequence[Any],
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
        plot="data:image/svg+xml;base64," + base64.b64encode(plot).decode(),
        columns=printed.COLUMNS,
        pictures=pictures,
        losses=findings.losses(result.samples, result.summary),
        bends=findings.bends(result.samples, result.summary),
        environment=environment,
        timed=max((row["n_timed"] for row in result.rows), default=0),
        resamples=RESAMPLES,
        seed=SEED,
        percent=printed.percent,
    )


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
