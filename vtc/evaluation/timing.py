"""Times of a few questions, each alone and warm, the full model's right before."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from vtc.evaluation.compression import FULL, Compression
from vtc.evaluation.flops import flops_of
from vtc.evaluation.measure import MEMORY, TIMES
from vtc.evaluation.model import Vtc

Times = dict[str, Any]


def times(model: Vtc, tasks: Sequence[Any], count: int) -> list[Times]:
    """What the first `count` questions of each task cost.

    The full model is timed on the same questions right before: what else a machine does changes
    slower than that. The first question of each is answered once for nothing.

    Args:
        model: of the method.
        tasks: from `load_tasks`.
        count: how many.

    Returns:
        Per question its `task` and `doc_id`, milliseconds and bytes as `Report` has them, and
        `full_ttft_ms`, the full model's time to the first token.

    Raises:
        VtcError, RuntimeError, ...: what stopped the method on a question.
    """
    found = []
    for task in tasks:
        asked, name = requests(model, task, count), task.config.task
        full = [numbers["ttft_ms"] for numbers in _asked(model, Compression(FULL), _one(asked))]
        own = _asked(model, model.compression, asked)
        for args, numbers, full_ms in zip(asked, own, full, strict=True):
            found.append({"task": name, "doc_id": args[3], **numbers, "full_ttft_ms": full_ms})
    return found


def flops(model: Vtc, task: Any) -> int:
    """Of the first question of a task, up to its first token; see `vtc.evaluation.flops`."""
    (first,) = _one(requests(model, task, 1))
    with model.compression.patch(model.loaded.model) as handle:
        return flops_of(lambda: model.answer([first], handle))


def requests(model: Vtc, task: Any, count: int) -> list[tuple[Any, ...]]:
    """The arguments of the first `count` requests of a task, which `model` can answer from now on.

    Args:
        model: any.
        task: one of `load_tasks`.
        count: how many.
    """
    task.build_all_requests(limit=count)
    model.task_dict[task.config.task] = task.dataset
    return [request.args for request in task.instances]


def _one(asked: Sequence[tuple[Any, ...]]) -> list[tuple[Any, ...]]:
    """The same questions, to be answered with one token."""
    return [(*args[:2], {**args[2], "max_new_tokens": 1}, *args[3:]) for args in asked]


def _asked(model: Vtc, compression: Compression, asked: Sequence[tuple[Any, ...]]) -> list[Times]:
    found = []
    with compression.patch(model.loaded.model) as handle:
        model.warm_up(asked[:1], handle)
        for args in asked:
            (answer,) = model.answer([args], handle)
            numbers = answer.token_counts.numbers
            found.append({name: numbers.get(name) for name in (*TIMES, *MEMORY)})
    return found
