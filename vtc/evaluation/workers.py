"""Cells answered by several processes of one thread each, while this one shows how far they are."""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import as_completed
from concurrent.futures.process import BrokenProcessPool
from typing import TYPE_CHECKING, Any

import torch

from vtc.errors import OptionError, VtcError
from vtc.evaluation.cells import Cell
from vtc.evaluation.models import Models
from vtc.evaluation.threads import cores

if TYPE_CHECKING:
    from vtc.evaluation.answering import Answering
    from vtc.evaluation.config import SweepConfig

# of the parameters; larger models make better use of the threads of one process, and of memory
_SMALL = 2**28
# each takes some seconds to start and a gigabyte
_MOST = 8
# threads that wait must not spin beside others that work
_ENVIRONMENT = {"OMP_WAIT_POLICY": "passive", "TOKENIZERS_PARALLELISM": "false"}
_answering: Answering | None = None


def workers_for(config: SweepConfig, models: Models, cells: int) -> int:
    """How many processes answer.

    Args:
        config: what was asked for; None: one for each core where all models are small and on a
            CPU, else one.
        models: of the sweep.
        cells: that have to be answered.

    Raises:
        OptionError: several on a GPU.
    """
    on_cpu = all(loaded.model.device.type == "cpu" for loaded in models.values())
    if config.workers not in (None, 1) and not on_cpu:
        raise OptionError(
            f"workers={config.workers} on a GPU, expected 1: they would share it; for several GPUs "
            "start torchrun --nproc-per-node N -m vtc sweep ..."
        )
    if config.workers is None and not (on_cpu and all(models.size(n) < _SMALL for n in models)):
        return 1
    return max(1, min(config.workers or min(cores(), _MOST), cells))


def answer_all(
    answering: Answering, sources: dict[str, str], cells: Sequence[Cell], workers: int
) -> Iterator[Cell]:
    """Answer cells in new processes; each is given as soon as it is written.

    Args:
        answering: of this process.
        sources: folders or hub ids by the short names of models.
        cells: which.
        workers: how many processes.

    Raises:
        SampleError, VtcError: of the first cell that failed; those that run by then are stopped,
            the finished ones stay.
    """
    # its processes are new ones, which share no lock with torch's threads here, and unlike those of
    # the standard library they do not run a user's script once more
    from joblib.externals.loky import ProcessPoolExecutor

    threads = max(1, cores() // workers)
    given = (answering.config, sources, answering.include, answering.fingerprints)
    start = (given, threads, workers, os.getpid())
    pool = ProcessPoolExecutor(workers, initializer=_start, initargs=start, env=_ENVIRONMENT)
    finished = False
    try:
        running = {pool.submit(_answer, cell): cell for cell in cells}
        for done in as_completed(running):
            done.result()
            yield running[done]
        finished = True
    except BrokenProcessPool:
        raise VtcError(
            f"one of {workers} processes was ended from outside (is there memory for them?); "
            "finished cells are kept: run it again, with fewer --workers"
        ) from None
    finally:
        pool.shutdown(kill_workers=not finished)


def _start(given: tuple[Any, ...], threads: int, workers: int, parent: int) -> None:
    global _answering
    # an interrupt from the keyboard goes to all; the first process ends the others
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_end_with, args=(parent,), daemon=True).start()
    torch.set_num_threads(threads)
    _may_grow()
    from vtc.evaluation.answering import Answering

    config, sources, include, fingerprints = given
    models = Models(sources, config.device, config.dtype)
    _answering = Answering(config, models, include, fingerprints, share=1 / workers)


def _may_grow() -> None:
    """Stay, with what encoders gave: loky takes 300 MB more for a leak and ends the process."""
    from joblib.externals.loky import process_executor

    process_executor._MAX_MEMORY_LEAK_SIZE = sys.maxsize


def _end_with(parent: int) -> None:
    """End with the first process, however that ends."""
    while os.getppid() == parent:
        time.sleep(0.5)
    os._exit(1)


def _answer(cell: Cell) -> None:
    if _answering is None:
        raise VtcError("this process was not started for a sweep")
    _answering.answer(cell)
