"""One process of a sweep: its models, tasks and stores, and what it takes to finish a cell."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vtc.errors import SampleError, VtcError
from vtc.evaluation.cells import Cell, settings, title, written
from vtc.evaluation.compression import FULL
from vtc.evaluation.evaluate import evaluate, flat_sample, load_tasks, quiet
from vtc.evaluation.fingerprint import environment, fingerprint
from vtc.evaluation.kept import packed
from vtc.evaluation.models import Models
from vtc.evaluation.store import Cells

if TYPE_CHECKING:
    from vtc.evaluation.config import SweepConfig
    from vtc.runtime.encodings import Encodings

Samples = list[dict[str, Any]]
# bytes of what encoders gave, held by all processes of a sweep together
_HELD = 2**32
# of settings, those that a time does not depend on: each timed question runs alone
_NOT_OF_TIMES = ("questions", "metric", "batch_size")


class Answering:
    """Answers and times cells, and finds those that are finished.

    Args:
        config: the sweep's.
        models: of the sweep.
        include: folder of task files, or None.
        fingerprints: of each model, as the first process found them; None: this is the first.
        share: of the memory that is for what encoders gave.
    """

    def __init__(
        self,
        config: SweepConfig,
        models: Models,
        include: Path | None,
        fingerprints: Mapping[str, dict[str, str]] | None = None,
        share: float = 1.0,
    ) -> None:
        self.config, self.models, self.include = config, models, include
        # code and data may be edited while a sweep runs
        self.fingerprints = fingerprints or {
            name: fingerprint(loaded, include) for name, loaded in models.items()
        }
        self._stores: dict[tuple[str, bool], Cells] = {}
        self._tasks: dict[str, list[Any]] = {}
        self._flops: dict[tuple[Any, ...], int] = {}
        self._limit = int(_HELD * share)
        self._encodings: tuple[str, Encodings] | None = None

    def tasks(self, name: str) -> list[Any]:
        """The tasks behind a name, loaded when they are needed first.

        Raises:
            OptionError, InputError: as `load_tasks`.
        """
        if name not in self._tasks:
            with quiet():
                self._tasks[name] = load_tasks((name,), self.include)
        return self._tasks[name]

    def answered(self, cell: Cell) -> Samples | None:
        """The samples of a cell, each with the name of its `cell`; None: it was not run yet."""
        store, named = self._store(cell.model), settings(self.config, cell)
        found = store.load(named)
        if found is None:
            return None
        name = store.name(named)
        return [{**sample, "cell": name} for sample in found["samples"]]

    def timed(self, cell: Cell) -> Samples | None:
        """The times of a cell, each with the name of its file as `timed_in`; None: they were not
        taken yet, or on another machine."""
        if not self.config.timed_samples:
            return []
        store, named = self._store(cell.model, times=True), self._times_settings(cell)
        if (found := store.load(named)) is None:
            return None
        name = store.name(named)
        return [{**sample, "timed_in": name} for sample in found["samples"]]

    def finished(self, cell: Cell) -> Samples | None:
        """The samples of a cell with their times; None: something is missing."""
        samples, times = self.answered(cell), self.timed(cell)
        if samples is None or times is None:
            return None
        found = {(line["task"], line["doc_id"]): line for line in times}
        return [
            {**sample, **found.get((sample["task"], sample["doc_id"]), {})} for sample in samples
        ]

    def answer(self, cell: Cell) -> None:
        """Ask a cell's questions and write its samples.

        Raises:
            SampleError: a question failed.
            VtcError: lmms-eval stopped, or the cell cannot be written.
        """
        from vtc.evaluation.measure import MEMORY, TIMES

        with _named(cell), quiet():
            config = self.config
            model = self._model(
                cell,
                batch_size=config.batch_size,
                record_left=True,
                encodings=self._encoded(cell.model),
            )
            results = evaluate(model, self.tasks(cell.task), config.questions)
            if not results:
                return
            # several processes hand over their shares one behind the other
            lines = [
                (sample, flat_sample(task, sample, config.metric))
                for task, logged in results["samples"].items()
                for sample in sorted(logged, key=lambda sample: int(sample["doc_id"]))
            ]
        left = [line.pop("left", None) or [] for _, line in lines]
        # a batch of one question has times too, but not those of a machine with nothing else to do
        samples = [line | dict.fromkeys((*TIMES, *MEMORY)) for _, line in lines]
        summary = {"results": results["results"]}
        self._store(cell.model).save(settings(self.config, cell), summary, samples, packed(left))

    def time(self, cell: Cell) -> None:
        """Time a cell's first questions and write what they took.

        Raises:
            SampleError: a question failed.
            VtcError: the times cannot be written.
        """
        from vtc.evaluation.timing import times

        with _named(cell), quiet():
            try:
                model, tasks = self._model(cell), self.tasks(cell.task)
                found = times(model, tasks, self.config.timed_samples)
                self._count(cell, model, found)
            except Exception as error:
                raise SampleError(
                    f"a timed question failed, so no times are reported: {type(error).__name__}: "
                    f"{error}"
                ) from error
        self._store(cell.model, times=True).save(self._times_settings(cell), {}, found)

    def check_blind(self, cells: Sequence[Cell], step: Callable[[str], object]) -> list[str]:
        """See that no method of the cells sees evidence: each once per model, where there is any.

        `step` is called with a method's label twice for each.

        Returns:
            A sentence for each that can't be judged.

        Raises:
            VtcError: a method peeks; or what stopped it on a question.
        """
        from vtc.evaluation.blind import check_blind, with_evidence

        # the sweep's own files; those of a user are not touched
        own = self.include is not None and self.config.include_path is None
        files = sorted(self.include.glob("*.parquet")) if self.include and own else []
        notes, done = [], set[tuple[str, str]]()
        for model, name in dict.fromkeys((cell.model, cell.task) for cell in cells):
            for task in self.tasks(name):
                last = {
                    cell.compression.label: partial(self._model, cell, record_left=True)
                    for cell in cells
                    if (cell.model, cell.task) == (model, name)
                    and (model, cell.compression.label) not in done
                    and cell.compression.method != FULL
                }
                if last and with_evidence(task):
                    with quiet():
                        notes += check_blind(last, task, files, step=step)
                    done |= {(model, label) for label in last}
        return notes

    def _count(self, cell: Cell, model: Any, found: Samples) -> None:
        """Give the first question of each task its FLOPs; positions and seeds don't change them."""
        from vtc.evaluation.timing import flops

        how = cell.compression
        seed = how.seed if how.keep is None else None
        for task in self.tasks(cell.task):
            name = task.config.task
            key = (cell.model, name, how.label, how.keep, seed)
            if key not in self._flops:
                self._flops[key] = flops(model, task)
            next(line for line in found if line["task"] == name)["flops"] = self._flops[key]

    def _encoded(self, model: str) -> Encodings | None:
        """What the encoder of a model gave in earlier cells; None on a GPU, whose memory is for
        larger models. Cells come model by model."""
        from vtc.runtime.encodings import Encodings

        if self.models[model].model.device.type != "cpu":
            return None
        if self._encodings is None or self._encodings[0] != model:
            self._encodings = model, Encodings(self._limit)
        return self._encodings[1]

    def _model(self, cell: Cell, **arguments: Any) -> Any:
        from vtc.evaluation.model import Vtc

        how = cell.compression
        return Vtc(
            self.models[cell.model],
            method=how.method,
            keep=written(how.keep),
            positions=how.positions,
            seed=how.seed,
            timed_samples=0,
            **arguments,
            **how.options,
        )

    def _times_settings(self, cell: Cell) -> dict[str, Any]:
        named = settings(self.config, cell)
        kept = {name: value for name, value in named.items() if name not in _NOT_OF_TIMES}
        return {**kept, "timed_samples": self.config.timed_samples}

    def _store(self, model: str, times: bool = False) -> Cells:
        if (model, times) not in self._stores:
            found: dict[str, Any] = dict(self.fingerprints[model])
            if times:
                found |= {name: environment().get(name) for name in ("cpu", "gpu", "threads")}
            folder = self.config.out / ("times" if times else "cells")
            self._stores[model, times] = Cells(folder, found)
        return self._stores[model, times]


@contextmanager
def _named(cell: Cell) -> Iterator[None]:
    """An error of ours says in which cell it came up."""
    try:
        yield
    except VtcError as error:
        raise type(error)(f"cell {title(cell)}: {error}") from error
