"""The files of a sweep: CSV, JSON, plots and one HTML page that needs nothing else."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import pandas as pd

from vtc.evaluation import printed, store
from vtc.evaluation.album import Album
from vtc.evaluation.compression import FULL
from vtc.evaluation.figures import Chart, accuracy_chart, active_chart, time_chart
from vtc.evaluation.loading import Loaded
from vtc.evaluation.pictures import Gallery
from vtc.evaluation.rows import Row
from vtc.evaluation.sections import SPREAD, Drawn, View, view
from vtc.evaluation.statistics import RESAMPLES, SEED

if TYPE_CHECKING:
    from vtc.evaluation.sweep import SweepConfig, SweepResult

# failures shown of one model on one task
_FAILURES = 12


def write_outputs(
    config: SweepConfig,
    result: SweepResult,
    models: Mapping[str, Loaded],
    tasks: Sequence[Any],
    environment: Mapping[str, str],
) -> None:
    """Write `table.csv`, `table.json`, the figures and `report.html`.

    Args:
        config: what was run.
        result: what came of it.
        models: by the short name that stands in the rows.
        tasks: lmms-eval's, whose pictures are shown; none: no pictures.
        environment: versions and the machine.
    """
    out = config.out
    store.write(out / "table.csv", _csv(result.rows))
    ranked = result.ranking
    content = {
        "rows": result.rows,
        "summary": result.summary,
        "ranking": ranked,
        "notes": list(result.notes),
        "environment": dict(environment),
    }
    store.write(out / "table.json", store.to_json(content))
    charts = _charts(result, _machine(models, environment))
    for name, chart in charts.items():
        for ending, data in chart.sheet().items():
            store.write(out / f"{name}.{ending}", data)
    pages = _Pages(config, result, models, tasks, ranked)
    views = list(pages.views(charts))
    store.write(out / "report.html", _page(config, result, views, environment))


def _charts(result: SweepResult, machine: str) -> dict[str, Chart]:
    summary = result.summary
    tasks = dict.fromkeys(row["task"] for row in summary)
    chance = {task: v for task in tasks if (v := _chance(result.samples, task)) is not None}
    found = {
        "accuracy": accuracy_chart(summary, chance),
        "accuracy_active": active_chart(summary, chance),
        "accuracy_time": time_chart(summary, chance, machine),
    }
    return {name: chart for name, chart in found.items() if chart is not None}


@dataclass(frozen=True)
class _Pages:
    """What the page shows of every model and task."""

    config: SweepConfig
    result: SweepResult
    models: Mapping[str, Loaded]
    tasks: Sequence[Any]
    ranked: Sequence[Row]

    def views(self, charts: Mapping[str, Chart]) -> Iterator[View]:
        """One model after the other: only one of several large ones fits into memory."""
        summary, frame = self.result.summary, self.result.samples
        for model, task in dict.fromkeys((row["model"], row["task"]) for row in summary):
            rows, ranked = _of(summary, model, task), _of(self.ranked, model, task)
            own = frame[(frame["model"] == model) & (frame["task"] == task)]
            yield view(
                own,
                rows,
                ranked,
                self._drawn(own, rows, model, task),
                parameters=_size(self.models[model]),
                chance=_chance(own, task),
                charts=_worth_showing(charts, rows),
            )

    def _drawn(self, frame: pd.DataFrame, rows: Sequence[Row], model: str, task: str) -> Drawn:
        found = [one for one in self.tasks if one.config.task == task]
        if not (found and self.config.pictures):
            return Drawn()
        shown = Gallery(frame, rows, self.models[model], found[0])
        return Drawn(
            shown.examples(self.config.pictures), shown.layers(), shown.failures(_FAILURES)
        )


def _of(rows: Sequence[Row], model: str, task: str) -> list[Row]:
    return [row for row in rows if (row["model"], row["task"]) == (model, task)]


def _worth_showing(charts: Mapping[str, Chart], rows: Sequence[Row]) -> dict[str, Chart]:
    """Without methods that act in the LLM the second figure is the first once more."""
    inside = any(abs(row["active_fraction"] - row["kept_fraction"]) > 1e-6 for row in rows)
    return {name: c for name, c in charts.items() if inside or name != "accuracy_active"}


def _machine(models: Mapping[str, Loaded], environment: Mapping[str, str]) -> str:
    """What ran the models, as a figure names it."""
    if next(iter(models.values())).model.device.type == "cuda":
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
        lists = {name: " ".join(value) for name, value in row.items() if isinstance(value, list)}
        writer.writerow({**row, "options": options, **lists})
    return buffer.getvalue()


def _chance(frame: pd.DataFrame, task: str) -> float | None:
    """Accuracy by guessing on these questions; known for the testbed only."""
    from vtc.testbed import KINDS

    full = frame[(frame["task"] == task) & (frame["label"] == FULL)]
    # every model is asked the same
    kinds = full[full["model"] == full["model"].iloc[0]]["kind"] if len(full) else full["kind"]
    values = [KINDS[kind] for kind in kinds if kind in KINDS]
    return sum(values) / len(values) if values and len(values) == len(kinds) else None


def _page(
    config: SweepConfig,
    result: SweepResult,
    views: Sequence[View],
    environment: Mapping[str, str],
) -> str:
    import jinja2

    album = _album(views)
    template = jinja2.Environment(
        loader=jinja2.PackageLoader("vtc.evaluation"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    ).get_template("report.html.j2")
    methods = {row["label"] for row in result.summary} - {FULL}
    return template.render(
        views=views,
        models=list(dict.fromkeys(view.model for view in views)),
        tasks=list(dict.fromkeys(view.task for view in views)),
        methods=len(methods),
        command=config.command,
        config=config,
        columns=(*printed.COLUMNS, *SPREAD),
        notes=[printed.short(note) for note in result.notes],
        environment=environment,
        timed=max((row["n_timed"] for row in result.rows), default=0),
        resamples=RESAMPLES,
        seed=SEED,
        percent=printed.percent,
        name=printed.name,
        uri=album.uri,
    )


def _album(views: Sequence[View]) -> Album:
    """All pictures of the page: what they have room for depends on how many there are."""
    shown = [s for view in views for example in view.drawn.examples for s in example.shown]
    broken = [failure for view in views for failure in view.drawn.failures]
    small = [s.image for s in shown] + [s.scores for s in shown if s.scores is not None]
    small += [image for failure in broken for image in (failure.picture, failure.left)]
    return Album(small, [s.image for view in views for s in view.drawn.layers])
