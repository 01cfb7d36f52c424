"""Method × keep through stock lmms-eval: a resumable grid of cells, then table, plot and report."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from tqdm import tqdm

import vtc
from vtc.errors import OptionError, VtcError
from vtc.evaluation.compression import Compression, parse_method
from vtc.evaluation.evaluate import evaluate, flat_sample, load_tasks, quiet, require_extra
from vtc.evaluation.loading import Loaded, load
from vtc.evaluation.store import Cells, check_writable
from vtc.evaluation.threads import within_quota
from vtc.methods.base import Method

KEEPS = (1.0, 0.5, 0.33, 0.22, 0.11, 0.055)
FULL = "none"
RANDOM = "random"
# in every report, because they win more often than papers show (arXiv 2502.11501, 2510.07143)
BASELINES = (RANDOM, "uniform", "average_pool", "downsample")
TESTBED_TASK = "vtc_scenes"


@dataclass(frozen=True, kw_only=True)
class SweepConfig:
    """What to run.

    Args:
        model: a folder or a hub id.
        out: folder of results; a second run with it goes on where the first stopped.
        methods: names, or `"vtc_cls:start=8"` with options; the baselines are added.
        keeps: fractions or tokens per image; everything (1.0) is the full model, run once.
        positions: policies for `methods` and for `random`; other baselines run under the first.
        questions: the first so many of each task; of the testbed's task, so many are made.
        seeds: of `random`; other methods take the first.
        tasks: lmms-eval tasks.
        include_path: folder of task files; None: the testbed's for its task, else lmms-eval's own.
        metric: the key of a question's score; None: found by itself.
        device: `"cpu"`, `"cuda"`, ...; None: CUDA where there is one.
        dtype: `"auto"`: the checkpoint's on a GPU, float32 on a CPU.
        batch_size: questions per call.
        timed_samples: questions per cell that run alone, to be timed.
        pictures: pictures in the report, the first question of so many kinds.
        command: shown in the report as the way to run it again.
    """

    model: str
    out: Path = Path("out/sweep")
    methods: tuple[str, ...] = ("vtc_cls",)
    keeps: tuple[float | int, ...] = KEEPS
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
        for name in ("methods", "keeps", "positions", "seeds", "tasks"):
            if isinstance(value := getattr(self, name), str) or not tuple(value):
                raise OptionError(f"{name}={value!r}: expected at least one, in a tuple")
            object.__setattr__(self, name, tuple(value))
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
        out: the folder of `table.csv`, `table.json`, `accuracy.png`, `accuracy.svg` and
            `report.html`.
    """

    rows: list[dict[str, Any]]
    summary: list[dict[str, Any]]
    out: Path
    samples: Any = field(repr=False)

    @property
    def report(self) -> Path:
        """The HTML report."""
        return self.out / "report.html"

    def show(self) -> None:
        """Print the table."""
        from vtc.evaluation.printed import show

        show(self.summary)

    def to_dict(self) -> dict[str, Any]:
        """Ready for JSON."""
        return {"rows": self.rows, "summary": self.summary, "report": str(self.report)}


def plan(config: SweepConfig) -> list[Compression]:
    """All cells of a sweep, the full model first.

    Raises:
        OptionError: a method, an option, a keep or a position policy does not exist.
    """
    cells = [Compression(FULL, seed=config.seeds[0])]
    given = [parse_method(text) for text in config.methods]
    names = [name for name, _ in given]
    methods = [*given, *((name, {}) for name in BASELINES if name not in names)]
    for name, options in methods:
        if name == FULL:
            continue
        swept = name in names or name == RANDOM
        for keep in _keeps(vtc.method(name, **options), config.keeps):
            for positions in config.positions if swept else config.positions[:1]:
                for seed in config.seeds if name == RANDOM else config.seeds[:1]:
                    cells.append(Compression(name, _written(keep), positions, seed, options))
    return cells


def _keeps(method: Method, keeps: tuple[float | int, ...]) -> list[float | int | None]:
    if method.count == "adaptive":
        return [None]
    # an int of 1 is one token, 1.0 is everything, and the two are equal in Python
    return [keep for keep in dict.fromkeys(keeps) if not (isinstance(keep, float) and keep == 1.0)]


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
        include = _include(config)
        tasks = _Tasks(config.tasks, include)
        samples = _run_cells(config, cells, loaded, tasks, include)
        return _report(config, samples, loaded, tasks)


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
            bar.set_postfix_str(" ".join(_words(cell)))
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
) -> SweepResult:
    from vtc.evaluation import table
    from vtc.evaluation.fingerprint import environment
    from vtc.evaluation.report import write_outputs

    frame = table.samples_frame(samples)
    result = SweepResult(*table.tables(frame), out=config.out, samples=frame)
    write_outputs(config, result, loaded, tasks.all if config.pictures else [], environment())
    return result


def settings(config: SweepConfig, cell: Compression) -> dict[str, Any]:
    """Everything that names a cell: two cells differ in it or are the same."""
    return {
        **dataclasses.asdict(cell),
        "tasks": list(config.tasks),
        "questions": config.questions,
        "metric": config.metric,
        "batch_size": config.batch_size,
        "timed_samples": config.timed_samples,
    }


def _run_cell(
    config: SweepConfig, cell: Compression, loaded: Loaded, tasks: list[Any], store: Cells
) -> dict[str, Any]:
    from vtc.evaluation.model import Vtc

    try:
        with quiet():
            model = Vtc(
                loaded,
                method=cell.method,
                keep=_written(cell.keep),
                positions=cell.positions,
                seed=cell.seed,
                batch_size=config.batch_size,
                timed_samples=config.timed_samples,
                **cell.options,
            )
            results = evaluate(model, tasks, config.questions)
    except VtcError as error:
        raise type(error)(f"cell {' '.join(_words(cell))}: {error}") from error
    samples = [
        flat_sample(task, sample, config.metric)
        for task, logged in results["samples"].items()
        for sample in logged
    ]
    summary = {"results": results["results"], "throughput": results.get("throughput", {})}
    store.save(settings(config, cell), summary, samples)
    found = store.load(settings(config, cell))
    if found is None:
        raise VtcError(f"cell {' '.join(_words(cell))} was written but cannot be read back")
    return found


def _written(keep: float | int | str | None) -> str | None:
    """`keep` as text that cannot be misread."""
    return f"{keep}tok" if isinstance(keep, int) else None if keep is None else str(keep)


def _words(cell: Compression) -> Iterator[str]:
    yield cell.label
    if cell.method != FULL:
        yield f"keep={_written(cell.keep)}"
        yield cell.positions
    if cell.method == RANDOM:
        yield f"seed={cell.seed}"


def _include(config: SweepConfig) -> Path | None:
    if config.include_path or TESTBED_TASK not in config.tasks:
        return config.include_path
    from vtc.testbed import write_tasks

    folder: Path = write_tasks(config.out / "tasks", config.questions)
    return folder
