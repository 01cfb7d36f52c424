"""No method sees which tokens carry the answer: a check by giving its questions other evidence.

What a method is given (`vtc.types.Tokens`) leads to no question. But a method is Python code in the
process that asks them, so it could find their boxes all the same. Therefore some questions are
asked twice, with nothing changed but the evidence: every data set that the process has loaded, and
every file that is named, gets each question's boxes from the next question. Answers and kept tokens
must not change. What this cannot see: boxes that a method wrote down elsewhere before the check, or
makes anew from the testbed's own generator.
"""

from __future__ import annotations

import contextlib
import gc
import io
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from vtc.errors import VtcError
from vtc.evaluation.store import write
from vtc.evaluation.timing import requests

if TYPE_CHECKING:
    from vtc.evaluation.model import Vtc

EVIDENCE = "evidence"
# of each method; one that looks at boxes shows it at the first
QUESTIONS = 4
# looked through for questions whose boxes are not the next one's
_AMONG = 32
Seen = list[tuple[str, tuple[bytes, ...]]]


def check_blind(
    methods: Mapping[str, Callable[[], Vtc]],
    task: Any,
    files: Sequence[Path] = (),
    count: int = QUESTIONS,
    step: Callable[[str], object] = lambda name: None,
) -> list[str]:
    """See that methods decide the same whatever the evidence of their questions is.

    Args:
        methods: by name, what builds its lmms-eval model, with `record_left=True`.
        task: one of `load_tasks`; without evidence there is nothing to see, and nothing is run.
        files: of its questions (parquet); they are changed and changed back, so they must be the
            caller's own, and nobody else may read them meanwhile.
        count: questions of each method.
        step: called with a method's name whenever it has answered them: twice for each.

    Returns:
        A sentence for each method that can't be judged, because it does not decide the same twice.

    Raises:
        VtcError: a method peeks.
    """
    asked = with_evidence(task, count)
    if not asked:
        return []

    def seen() -> dict[str, Seen]:
        found = {}
        for name, build in methods.items():
            found[name] = _seen(build(), task, asked)
            step(name)
        return found

    before = seen()
    with other_evidence(files):
        other = seen()
    notes = []
    for name in methods:
        changed = [i for i, a, b in zip(asked, before[name], other[name], strict=True) if a != b]
        if not changed:
            continue
        again = _seen(methods[name](), task, asked)
        with other_evidence(files):
            other_again = _seen(methods[name](), task, asked)
        if (again, other_again) != (before[name], other[name]):
            notes.append(
                f"{name} does not decide the same twice on the same questions, so whether it sees "
                "evidence can't be told"
            )
            continue
        raise VtcError(
            f"method {name} peeks: with other evidence it keeps other tokens or answers otherwise "
            f"in {len(changed)} of {len(asked)} questions (the first is {changed[0]} of "
            f"{task.config.task}), expected decisions from the picture and the text alone; a "
            "method must not read the questions' boxes"
        )
    return notes


@contextlib.contextmanager
def other_evidence(files: Sequence[Path] = ()) -> Iterator[None]:
    """Within it, each question of loaded data sets and of `files` has the next one's evidence."""
    import datasets

    with contextlib.ExitStack() as stack:
        for path in files:
            stack.enter_context(_rolled_file(path))
        # every one there is, and in place: also those that somebody else keeps a reference to
        for one in gc.get_objects():
            # by its type: a dead proxy cannot be asked what it stands for
            if issubclass(type(one), datasets.Dataset) and EVIDENCE in one.column_names:
                stack.enter_context(_rolled(one))
        yield


@contextlib.contextmanager
def _rolled(data: Any) -> Iterator[None]:
    values = list(data[EVIDENCE])
    other = data.remove_columns(EVIDENCE).add_column(
        EVIDENCE, _next(values), feature=data.features[EVIDENCE]
    )
    before, after = dict(data.__dict__), dict(other.__dict__)
    data.__dict__.clear()
    data.__dict__.update(after)
    try:
        yield
    finally:
        data.__dict__.clear()
        data.__dict__.update(before)


@contextlib.contextmanager
def _rolled_file(path: Path) -> Iterator[None]:
    from pyarrow import parquet

    content, stat = path.read_bytes(), path.stat()
    table = parquet.read_table(io.BytesIO(content))
    if EVIDENCE not in table.column_names or not len(table):
        yield
        return
    at = table.column_names.index(EVIDENCE)
    order = _next(list(range(len(table))))
    changed = table.set_column(at, table.schema.field(at), table[EVIDENCE].take(order))
    buffer = io.BytesIO()
    parquet.write_table(changed, buffer)
    try:
        write(path, buffer.getvalue())
        yield
    finally:
        write(path, content)
        os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))


def _next(values: list[Any]) -> list[Any]:
    return values[1:] + values[:1]


def with_evidence(task: Any, count: int = QUESTIONS) -> list[int]:
    """Numbers of questions that have evidence, and other evidence than the next one."""
    docs = task.eval_docs
    if EVIDENCE not in docs.column_names:
        return []
    values = list(docs[EVIDENCE])
    pairs = zip(values[:_AMONG], _next(values)[:_AMONG], strict=True)
    return [i for i, (own, other) in enumerate(pairs) if own and own != other][:count]


def _seen(model: Vtc, task: Any, asked: Sequence[int]) -> Seen:
    """Answer and kept tokens of each question, each asked alone."""
    by_number = {args[3]: args for args in requests(model, task, max(asked) + 1)}
    devices = [model.device] if model.device.type == "cuda" else []
    found: Seen = []
    with torch.random.fork_rng(devices), model.compression.patch(model.loaded.model) as handle:
        for number in asked:
            torch.manual_seed(model.compression.seed)
            try:
                (answer,) = model.answer([by_number[number]], handle)
            except Exception as error:
                # is the same both times, and said when the question is asked to be scored
                found.append((f"{type(error).__name__}: {error}", ()))
                continue
            left = answer.token_counts.left or []
            masks = tuple(mask.tobytes() for one in left for mask in (one.kept, one.covered))
            found.append((answer.text, masks))
    return found
