"""Method × keep through stock lmms-eval: a resumable grid of cells, then table, plot and report."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from tqdm import tqdm

from vtc.errors import OptionError, VtcError
from vtc.evaluation.cells import distinct, left_out, plan, settings, words, written
from vtc.evaluation.compression import Compression
from vtc.evaluation.evaluate import evaluate, flat_sample, load_tasks, quiet, require_extra
from vtc.evaluation.loading import Loaded, load
from vtc.evaluation.store import Cells, check_writable
from vtc.evaluation.threads import within_quota
from vtc.types import Budget

KEEPS = (1.0, 0.5, 0.33, 0.22, 0.11, 0.055)
TESTBED_TASK = "vtc_scenes"


@dataclass(frozen=True, kw_only=True)
class SweepConfig:
    """What to run.

    Args:
        model: a folder or a hub id.
        out: folder of results; a second run with it goes on where the first stopped.
        methods: names, `"vtc_cls:start=8"` with options, or compositions, see `parse_method`; the
            baselines are added. Those that decide by themselves how much they keep run once.
        keeps: fractions or tokens per image; everything (1.0) is the full model, run once.
        layer_keeps: shares of decoder layers, for methods that skip work in them; None: the
            fractions among `keeps`. Those that come to the same layers run once.
        positions: policies for `methods` and for `random`; other baselines, and methods that drop
            no token before the LLM, run under the first.
        questions: the first so many of each task; of the testbed's task, so many are made.
        seeds: of `random` and of methods with `scorer=random`; others take the first.
        tasks: lmms-eval tasks.
        include_path: folder of task files; None: the testbed's for its task, else lmms-eval's own.
        metric: the key of a question's score; None: found by itself.
        device: `"cpu"`, `"cuda"`, ...; None: CUDA where there is one.
        dtype: `"auto"`: the checkpoint's on a GPU, float32 on a CPU.
        batch_size: questions per call.
        timed_samples: questions per cell that run alone, to be timed; the full model is timed on
            the same ones right before.
        pictures: pictures in the report, the first question of so many kinds.
        command: shown in the report as the way to run it again.
    """

    model: str
    out: Path = Path("out/sweep")
    methods: tuple[str, ...] = ("vtc_cls",)
    keeps: tuple[float | int, ...] = KEEPS
    layer_keeps: tuple[float, ...] | None = None
    positions: tuple[str, ...] = ("keep", "renumber")
    questions: int = 200
    seeds: tuple[int, ...] = (0, 1, 2)
    tasks: tuple[str, ...] = (TESTBED_TASK,)
    include_path: Path | None = None
    metric: str | None = None
    device: str | None = None
    dtype: str = "auto"
    batch_size: int = 16
    timed_samples: int = 12
    pictures: int = 4
    command: str = ""

    def __post_init__(self) -> None:
        for name in ("methods", "keeps", "layer_keeps", "positions", "seeds", "tasks"):
            if (value := getattr(self, name)) is None and name == "layer_keeps":
                continue
            if isinstance(value, str) or not tuple(value):
                raise OptionError(f"{name}={value!r}: expected at least one, in a tuple")
            object.__setattr__(self, name, tuple(value))
        for keep in self.layer_keeps or ():
            if not isinstance(Budget.of(keep).keep, float):
                raise OptionError(
                    f"layer_keeps={self.layer_keeps}: got {keep!r}, expected floats in (0, 1], the "
                    "share of decoder layers in which visual rows stay active"
                )
        for name, least in (
            ("questions", 1),
            ("batch_size", 1),
            ("timed_samples", 0),
            ("pictures", 0),
        ):
            if getattr(self, name) < least:
                raise OptionError(f"{name}={getattr(self, name)}: expected at least {least}")
        object.__setattr__(self, "out", Path(self.out))


@dataclass(frozen=True)
class SweepResult:
    """What a sweep found, and where it lies.

    Attributes:
        rows: one per cell and task, as in `table.csv`.
        summary: the same with the seeds of a method averaged, as printed.
        out: the folder of `table.csv`, `table.json`, `report.html` and the figures, each as PNG and
            SVG: `accuracy` (against tokens kept), `accuracy_active` (against active visual tokens,
            averaged over decoder layers) and, if anything was timed, `accuracy_time`.
        notes: what was not run, and why.
    """

    rows: list[dict[str, Any]]
    summary: list[dict[str, Any]]
    out: Path
    notes: tuple[str, ...]
    samples: Any = field(repr=False)

    @property
    def report(self) -> Path:
        """The HTML report."""
        return self.out / "report.html"

    def show(self) -> None:
        """Print the table."""
        from vtc.evaluation.printed import show

        show(self.summary)
        for note in self.notes:
            print(note)

    def to_dict(self) -> dict[str, Any]:
        """Ready for JSON."""
        return {
            "rows": self.rows,
            "summary": self.summary,
            "notes": list(self.notes),
            "report": str(self.report),
        }


def run(config: SweepConfig) -> SweepResult:
    """Run or resume a sweep and write its results.

    Raises:
        OptionError, SignalError: a setting that does not exist, or not on this model; before any
            question is asked.
        SampleError: a question of a cell failed; finished cells stay, no report is written.
        VtcError: the folder cannot be written, the eval extra is missing, the model does not load.
    """
    require_extra()
    cells = plan(config)
    check_writable(config.out)
    with within_quota():
        with quiet():
            loaded = load(config.model, config.device, dtype=config.dtype)
        _check(cells, loaded)
        cells, same = distinct(cells, _depth(loaded))
        include = _include(config)
        tasks = _Tasks(config.tasks, include)
        samples = _run_cells(config, cells, loaded, tasks, include)
        return _report(config, samples, loaded, tasks, (*left_out(config), *same))


def _depth(loaded: Loaded) -> int:
    """Decoder layers of the model."""
    from vtc.adapters.registry import adapter_of

    model: Any = adapter_of(loaded.model).language_model
    return len(model.layers)


def _check(cells: Sequence[Compression], loaded: Loaded) -> None:
    """Patch once for every cell: what this model refuses is said before the first one is run."""
    for cell in cells:
        with cell.patch(loaded.model):
            pass


class _Tasks:
    """Tasks with their questions, loaded when they are needed first."""

    def __init__(self, names: tuple[str, ...], include: Path | None) -> None:
        self._names, self._include = names, include

    @cached_property
    def all(self) -> list[Any]:
        with quiet():
            return load_tasks(self._names, self._include)


def _run_cells(
    config: SweepConfig,
    cells: Sequence[Compression],
    loaded: Loaded,
    tasks: _Tasks,
    include: Path | None,
) -> list[tuple[Compression, list[dict[str, Any]]]]:
    """Every cell with its samples; those that are finished are read."""
    from vtc.evaluation.fingerprint import fingerprint

    store = Cells(config.out / "cells", fingerprint(loaded, include))
    samples = []
    with tqdm(cells, desc="sweep", unit="cell", dynamic_ncols=True) as bar:
        for cell in bar:
            bar.set_postfix_str(" ".join(words(cell)))
            found = store.load(settings(config, cell))
            if found is None:
                found = _run_cell(config, cell, loaded, tasks.all, store)
            samples.append((cell, found["samples"]))
    return samples


def _report(
    config: SweepConfig,
    samples: Sequence[tuple[Compression, list[dict[str, Any]]]],
    loaded: Loaded,
    tasks: _Tasks,
    notes: tuple[str, ...],
) -> SweepResult:
    from vtc.evaluation import table
    from vtc.evaluation.fingerprint import environment
    from vtc.evaluation.report import write_outputs

    name = Path(config.model).name
    frame = table.samples_frame((name, *cell) for cell in samples)
    result = SweepResult(*table.tables(frame), out=config.out, notes=notes, samples=frame)
    write_outputs(config, result, loaded, tasks.all if config.pictures else [], environment())
    return result


def _run_cell(
    config: SweepConfig, cell: Compression, loaded: Loaded, tasks: list[Any], store: Cells
) -> dict[str, Any]:
    from vtc.evaluation.model import Vtc

    try:
        with quiet():
            model = Vtc(
                loaded,
                method=cell.method,
                keep=written(cell.keep),
                positions=cell.positions,
                seed=cell.seed,
                batch_size=config.batch_size,
                timed_samples=config.timed_samples,
                time_full=True,
                **cell.options,
            )
            results = evaluate(model, tasks, config.questions)
    except VtcError as error:
        raise type(error)(f"cell {' '.join(words(cell))}: {error}") from error
    samples = [
        flat_sample(task, sample, config.metric)
        for task, logged in results["samples"].items()
        for sample in logged
    ]
    summary = {"results": results["results"], "throughput": results.get("throughput", {})}
    store.save(settings(config, cell), summary, samples)
    found = store.load(settings(config, cell))
    if found is None:
        raise VtcError(f"cell {' '.join(words(cell))} was written but cannot be read back")
    return found


def _include(config: SweepConfig) -> Path | None:
    if config.include_path or TESTBED_TASK not in config.tasks:
        return config.include_path
    from vtc.testbed import write_tasks

    folder: Path = write_tasks(config.out / "tasks", config.questions)
    return folder
