"""Several processes started by torchrun: lmms-eval shares each cell's questions among them."""

from __future__ import annotations

import os
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, TypeVar

from vtc.errors import VtcError

T = TypeVar("T")


def start() -> None:
    """Join the other processes of a torchrun, if there are any, and see that they are all there.

    Raises:
        VtcError: torchrun started another number than there is.
    """
    if (expected := size()) == 1:
        return
    import torch
    from accelerate import PartialState

    # lmms-eval builds an Accelerator, which shares this state; without a GPU it would join nobody
    found = PartialState(cpu=not torch.cuda.is_available()).num_processes
    if found != expected:
        raise VtcError(
            f"torchrun started {expected} processes and {found} joined, expected all; start "
            "torchrun --nproc-per-node N -m vtc sweep ..., not accelerate launch"
        )


def size() -> int:
    """Processes that torchrun started; 1 without it."""
    return int(os.environ.get("WORLD_SIZE", 1))


def is_first() -> bool:
    """Whether this is the process that writes and reports."""
    return int(os.environ.get("RANK", 0)) == 0


def agreed(value: Any) -> Any:
    """The first process's `value`, in all of them."""
    if size() == 1:
        return value
    from accelerate.utils import broadcast_object_list

    return broadcast_object_list([value])[0]


def share(values: Sequence[T]) -> Sequence[T]:
    """This process's share of `values`."""
    return values[int(os.environ.get("RANK", 0)) :: size()]


def wait() -> None:
    """Until all processes are here."""
    if size() > 1:
        from accelerate import PartialState

        PartialState().wait_for_everyone()


def first_before_others() -> AbstractContextManager[None]:
    """Within it, the first process is done before others begin."""
    if size() == 1:
        return nullcontext()
    from accelerate import PartialState

    found: AbstractContextManager[None] = PartialState().main_process_first()
    return found
