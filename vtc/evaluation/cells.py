"""The cells of a sweep: each method at each keep, under each position policy and seed, of each
model on each task."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vtc.calibration.data import FILE
from vtc.errors import OptionError
from vtc.evaluation.compression import (
    FULL,
    RANDOM,
    Compression,
    build,
    draws,
    parse_method,
    stages,
)
from vtc.methods.base import Method
from vtc.types import Budget

if TYPE_CHECKING:
    from vtc.evaluation.config import SweepConfig

# in every report, because they win more often than papers show (arXiv 2502.11501, 2510.07143)
BASELINES = (RANDOM, "uniform", "average_pool", "downsample")
# position ids are made at the LLM's entrance: what acts behind it has nothing to renumber
_BEFORE_THE_LLM = ("pixels", "encoder", "llm_input")


@dataclass(frozen=True)
class Cell:
    """What is run and stored as one.

    Attributes:
        model: its short name.
        task: as it was asked for; a group has several.
        compression: what is done to the model.
    """

    model: str
    task: str
    compression: Compression


def plan(config: SweepConfig) -> list[Compression]:
    """What is run of every model on every task, the full model first.

    Raises:
        OptionError: a method, an option, a keep or a position policy does not exist, or no keep is
            one that a method takes.
    """
    cells = [Compression(FULL, seed=config.seeds[0])]
    methods = [parse_method(text) for text in config.methods]
    names = [name for name, _ in methods]
    # with options, a baseline is a method like others and stands for none
    methods += [(name, {}) for name in BASELINES if (name, {}) not in methods]
    for name, options in methods:
        if name == FULL:
            continue
        method = build(name, options)
        swept = name in names or name == RANDOM
        renumbers = any(m.site in _BEFORE_THE_LLM for m in stages(method))
        for keep in _keeps(method, config):
            for positions in config.positions if swept and renumbers else config.positions[:1]:
                for seed in config.seeds if draws(method) else config.seeds[:1]:
                    cells.append(Compression(name, written(keep), positions, seed, options))
    return list({(c.label, written(c.keep), c.positions, c.seed): c for c in cells}.values())


def _keeps(method: Method, config: SweepConfig) -> list[float | int | None]:
    if method.count == "adaptive":
        return [None]
    keeps = list(config.keeps)
    if method.site == "llm_rows":
        keeps = [keep for keep in config.layer_keeps or keeps if isinstance(keep, float)]
        if not keeps:
            raise OptionError(
                f"method {method.name!r} skips work in decoder layers and keeps={config.keeps} are "
                "tokens, expected a float in (0, 1]: the share of layers in which visual rows stay "
                "active; add one, or give layer_keeps"
            )
    # an int of 1 is one token, 1.0 is everything, and the two are equal in Python
    return [keep for keep in keeps if not (isinstance(keep, float) and _is_full(method, keep))]


def _is_full(method: Method, keep: float) -> bool:
    """Whether it would be the full model once more, whatever the size of a picture."""
    return keep == 1.0 and method.keeps_all(Budget.of(keep), (2,))


def left_out(config: SweepConfig) -> list[str]:
    """A sentence for the methods that were not run at all of the keeps."""
    tokens = [written(keep) for keep in config.keeps if isinstance(keep, int)]
    if config.layer_keeps or not tokens:
        return []
    methods = dict.fromkeys(
        text
        for text in config.methods
        if (method := build(*parse_method(text))).site == "llm_rows" and method.count != "adaptive"
    )
    if not methods:
        return []
    return [
        f"{', '.join(methods)}: not run at keep={', '.join(map(str, tokens))}, because they keep a "
        "share of the decoder layers, not tokens"
    ]


def distinct(cells: Sequence[Compression], depth: int) -> tuple[list[Compression], list[str]]:
    """The cells without those that come to the same layers of a model of `depth` layers as an
    earlier one, and a sentence for each method that lost some."""
    found: list[Compression] = []
    first: dict[tuple[Any, ...], Compression] = {}
    same: dict[tuple[str, str], dict[str, None]] = {}
    for cell in cells:
        if not isinstance(cell.keep, float) or cell.build().site != "llm_rows":
            found.append(cell)
            continue
        count = Budget.of(cell.keep).count(depth)
        earlier = first.setdefault((cell.label, cell.positions, cell.seed, count), cell)
        if earlier is cell:
            found.append(cell)
        else:
            said = f"{earlier.keep} ({count} of {depth} layers)"
            same.setdefault((cell.label, said), {})[str(cell.keep)] = None
    notes = [
        f"{label}: keep={', '.join(keeps)} not run, the same as keep={said}"
        for (label, said), keeps in same.items()
    ]
    return found, notes


def settings(config: SweepConfig, cell: Cell) -> dict[str, Any]:
    """Everything that names a cell: two cells differ in it or are the same."""
    return {
        "model": cell.model,
        "task": cell.task,
        **dataclasses.asdict(cell.compression),
        "questions": config.questions,
        "metric": config.metric,
        "batch_size": config.batch_size,
        **_calibrations(cell.compression),
    }


def _calibrations(cell: Compression) -> dict[str, list[str]]:
    """A number for what is in each calibration file that is named among the options."""
    named = [getattr(m, "calibration", None) for m in stages(cell.build())]
    paths = [Path(name).expanduser() for name in named if isinstance(name, str)]
    files = [path / FILE if path.is_dir() else path for path in paths]
    digests = [hashlib.sha256(file.read_bytes()).hexdigest()[:16] for file in files]
    return {"calibrations": digests} if digests else {}


def written(keep: float | int | str | None) -> str | None:
    """`keep` as text that cannot be misread."""
    return f"{keep}tok" if isinstance(keep, int) else None if keep is None else str(keep)


def words(cell: Compression) -> Iterator[str]:
    """What a cell is called while it runs."""
    yield cell.label
    if cell.method != FULL:
        yield f"keep={written(cell.keep)}"
        yield cell.positions
    if draws(cell.build()):
        yield f"seed={cell.seed}"


def title(cell: Cell) -> str:
    """A cell in words."""
    return " ".join([cell.model, cell.task, *words(cell.compression)])
