"""Models × methods × keeps × tasks through stock lmms-eval: resumable, then table and report."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tqdm import tqdm

from vtc.errors import InputError, OptionError, VtcError
from vtc.evaluation import distributed, workers
from vtc.evaluation.answering import Answering, Samples
from vtc.evaluation.cells import Cell, left_out, plan, title
from vtc.evaluation.compression import FULL
from vtc.evaluation.config import KEEPS, TESTBED_TASK, SweepConfig
from vtc.evaluation.evaluate import quiet, require_extra
from vtc.evaluation.models import Models, short_names
from vtc.evaluation.refusals import offered
from vtc.evaluation.store import check_writable, remove_leftovers
from vtc.evaluation.threads import within_quota

__all__ = ["KEEPS", "TESTBED_TASK", "SweepConfig", "SweepResult", "run"]


@dataclass(frozen=True)
class SweepResult:
    """What a sweep found, and where it lies.

    Attributes:
        rows: one per cell and task, as in `table.csv`.
        summary: the same with the seeds of a method averaged, as printed.
        ranking: one per curve, the largest area first, see `vtc.evaluation.ranking`.
        out: the folder of `table.csv`, `table.json`, `report.html`, the figures, each as PNG and
            SVG, and of `cells`: what was answered to each question and which tokens were left.
        notes: what was not run, and why.
        samples: a line per cell and question; `cell` names the files in `cells`.
    """

    rows: list[dict[str, Any]]
    summary: list[dict[str, Any]]
    ranking: list[dict[str, Any]]
    out: Path
    notes: tuple[str, ...]
    samples: Any = field(repr=False)

    @property
    def report(self) -> Path:
        """The HTML report."""
        return self.out / "report.html"

    @property
    def places(self) -> dict[str, Path]:
        """Where table, report and samples lie."""
        return {
            "report": self.report,
            "table": self.out / "table.csv",
            "samples": self.out / "cells",
        }

    def show(self) -> None:
        """Print the table."""
        from vtc.evaluation.orders import best
        from vtc.evaluation.printed import show

        show(self.summary)
        for line in best(self.ranking):
            print(line)
        for note in self.notes:
            print(note)

    def to_dict(self) -> dict[str, Any]:
        """Ready for JSON."""
        return {
            "rows": self.rows,
            "summary": self.summary,
            "ranking": self.ranking,
            "notes": list(self.notes),
            **{name: str(place) for name, place in self.places.items()},
        }


def run(config: SweepConfig) -> SweepResult:
    """Run or resume a sweep and write its results.

    A cell is written when it is answered, and once more when it is timed. What is written is never
    run again: a sweep that was ended at any point goes on there and ends with the same table, but
    for the times that were not taken yet.

    Raises:
        OptionError, SignalError: a setting that does not exist, or not on any of the models, or
            two tasks that hold the same questions; before any question is asked.
        InputError: the questions of none of the tasks are there.
        SampleError: a question of a cell failed; finished cells stay, no report is written.
        VtcError: the folder cannot be written, the eval extra is missing, a model does not load, a
            method sees which tokens carry the answer (`vtc.evaluation.blind`).
    """
    require_extra()
    compressions = plan(config)
    check_writable(config.out)
    distributed.start()
    with within_quota():
        models = Models(short_names(config.models), config.device, config.dtype)
        with quiet():
            wanted, notes = offered(compressions, models)
        include = _include(config)
        answering = Answering(config, models, include)
        cells = [
            Cell(model, task, compression)
            for model, own in wanted.items()
            for task in dict.fromkeys(config.tasks)
            for compression in own
        ]
        cells, missing = _with_questions(answering, cells)
        missing += _check_blind(answering, cells)
        used = _answer(config, answering, cells)
        samples = _finish(answering, cells)
        notes = [*left_out(config), *notes, *missing]
        return _report(config, samples, answering, notes, used)


def _with_questions(answering: Answering, cells: Sequence[Cell]) -> tuple[list[Cell], list[str]]:
    """The cells of tasks whose questions are there or not needed, and a sentence for each other."""
    tasks = list(dict.fromkeys(cell.task for cell in cells))
    missing: dict[str, InputError] = {}
    asked: dict[str, str] = {}
    for task in tasks:
        try:
            names = _parts(answering, [cell for cell in cells if cell.task == task])
        except InputError as error:
            missing[task] = error
            continue
        for name in names:
            if (other := asked.setdefault(name, task)) != task:
                raise OptionError(
                    f"tasks: {name!r} is asked for by {other!r} and by {task!r}, expected once: "
                    "its questions would count twice; leave one of them out"
                )
    if len(missing) == len(tasks):
        raise next(iter(missing.values()))
    left = [cell for cell in cells if cell.task not in missing]
    return left, [f"{task}: not run, because {error}" for task, error in missing.items()]


def _parts(answering: Answering, cells: Sequence[Cell]) -> list[str]:
    """The tasks behind the one of the cells; of finished cells, by what was answered."""
    if all(answering.finished(cell) is not None for cell in cells):
        return list(dict.fromkeys(line["task"] for line in answering.finished(cells[0]) or ()))
    return [task.config.task for task in answering.tasks(cells[0].task)]


def _check_blind(answering: Answering, cells: Sequence[Cell]) -> list[str]:
    """Once for each method that still has something to answer, before anybody reads questions."""
    with distributed.first_before_others():
        todo = [cell for cell in cells if answering.answered(cell) is None]
        if not distributed.is_first():
            return []
        own = {(c.model, c.compression.label) for c in todo if c.compression.method != FULL}
        with _bar("blindness", 2 * len(own), "check") as bar:

            def step(label: str) -> None:
                bar.set_postfix_str(label)
                bar.update()

            return answering.check_blind(todo, step)


def _answer(config: SweepConfig, answering: Answering, cells: Sequence[Cell]) -> int:
    """Answer, in several processes if that is faster, and say how many."""
    for folder in ("cells", "times", "."):
        remove_leftovers(config.out / folder)
    todo = distributed.agreed([cell for cell in cells if answering.answered(cell) is None])
    count = workers.workers_for(config, answering.models, len(todo))
    if distributed.size() > 1 or count == 1:
        done, count = _one_by_one(answering, todo), max(count, distributed.size())
    else:
        done = workers.answer_all(answering, short_names(config.models), todo, count)
    with _bar("answers", len(todo)) as bar:
        for cell in done:
            bar.set_postfix_str(title(cell))
            bar.update()
    return count


def _one_by_one(answering: Answering, cells: Sequence[Cell]) -> Iterator[Cell]:
    for cell in cells:
        answering.answer(cell)
        yield cell


def _finish(answering: Answering, cells: Sequence[Cell]) -> list[tuple[Cell, Samples]]:
    """Time what is not timed yet, in this process alone, and read everything."""
    found = []
    with _bar("times", len(distributed.share(cells))) as bar:
        # the processes of a torchrun have a GPU each
        for cell in distributed.share(cells):
            bar.set_postfix_str(title(cell))
            if answering.timed(cell) is None:
                answering.time(cell)
            bar.update()
        distributed.wait()
        for cell in cells:
            samples = answering.finished(cell)
            if samples is None:
                raise VtcError(
                    f"cell {title(cell)} was written but cannot be read back; is the disk sound?"
                )
            found.append((cell, samples))
    return found


def _bar(what: str, total: int, unit: str = "cell") -> Any:
    hidden = not total or not distributed.is_first()
    return tqdm(total=total, desc=what, unit=unit, dynamic_ncols=True, disable=hidden)


def _report(
    config: SweepConfig,
    samples: Sequence[tuple[Cell, Samples]],
    answering: Answering,
    notes: Sequence[str],
    used: int,
) -> SweepResult:
    from vtc.evaluation import table
    from vtc.evaluation.fingerprint import environment
    from vtc.evaluation.ranking import ranking
    from vtc.evaluation.report import write_outputs

    frame = table.samples_frame((cell.model, cell.compression, found) for cell, found in samples)
    rows, summary = table.tables(frame)
    ranked = ranking(frame, summary)
    names = dict.fromkeys(cell.task for cell, _ in samples) if config.pictures else ()
    tasks, unseen = _with_pictures(answering, names)
    result = SweepResult(rows, summary, ranked, config.out, (*notes, *unseen), frame)
    machine = {**environment(), "workers": str(used)}
    if distributed.is_first():
        write_outputs(config, result, answering.models, tasks, machine)
    return result


def _with_pictures(answering: Answering, names: Iterable[str]) -> tuple[list[Any], list[str]]:
    """Tasks to show pictures of, and a sentence for each whose questions are gone by now: what
    was answered is reported all the same."""
    found, notes = [], []
    for name in names:
        try:
            found += answering.tasks(name)
        except InputError as error:
            notes.append(f"{name}: no pictures, because {error}")
    return found, notes


def _include(config: SweepConfig) -> Path | None:
    if config.include_path or TESTBED_TASK not in config.tasks:
        return config.include_path
    from vtc.testbed import write_tasks

    with distributed.first_before_others():
        folder: Path = write_tasks(config.out / "tasks", config.questions)
    return folder
