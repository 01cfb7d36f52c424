"""One run of stock lmms-eval in this process: it asks the questions and scores the answers."""

from __future__ import annotations

import contextlib
import io
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from vtc.errors import InputError, OptionError, VtcError


def require_extra() -> None:
    """Raises `VtcError` with the command to run where the `eval` extra is not installed."""
    try:
        import lmms_eval  # noqa: F401
    except ImportError as error:
        raise VtcError(
            f"{error.name or 'lmms_eval'} is not installed, expected the eval extra; "
            f"pip install 'visual-token-compression[eval]'"
        ) from None


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Hold back lmms-eval's own log lines and bars; one bar over all runs says more."""
    from loguru import logger

    logger.disable("lmms_eval")
    logger.disable("vtc")
    try:
        with contextlib.redirect_stderr(io.StringIO()), contextlib.redirect_stdout(io.StringIO()):
            yield
    finally:
        logger.enable("lmms_eval")
        logger.enable("vtc")


def load_tasks(names: Sequence[str], include_path: Path | None) -> list[Any]:
    """lmms-eval tasks with their questions, for any number of runs.

    Args:
        names: of tasks or groups.
        include_path: a folder of task files; lmms-eval's own tasks are looked up for names that it
            does not have.

    Raises:
        OptionError: a name is unknown.
        InputError: a task's questions could not be loaded; it says how to get them.
    """
    from lmms_eval.evaluator_utils import get_task_list
    from lmms_eval.tasks import get_task_dict

    manager = _manager(names, include_path)
    try:
        found = get_task_dict(list(names), manager, "chat")
    except Exception as error:
        cause: BaseException = error
        while cause.__cause__ or cause.__context__:
            cause = cause.__cause__ or cause.__context__ or cause
        raise InputError(
            f"the questions of {', '.join(names)} could not be loaded: "
            f"{type(cause).__name__}: {' '.join(str(cause).split())[:300]}{_remedy(names, manager)}"
        ) from error
    return [output.task for output in get_task_list(found)]


def _manager(names: Sequence[str], include_path: Path | None) -> Any:
    """A `TaskManager` that knows the names; all of lmms-eval's are indexed (5 s) only if needed."""
    from lmms_eval.tasks import TaskManager

    include = str(include_path) if include_path else None
    for defaults in (False, True) if include else (True,):
        manager = TaskManager(include_path=include, include_defaults=defaults)
        missing = [name for name in names if name not in manager.all_tasks]
        parts = {part for name in names for part in _parts(name, manager)}
        if not missing and (defaults or parts <= {*manager.all_tasks}):
            return manager
        if not defaults:
            own = manager.all_tasks
    known = own if include else manager.all_tasks
    raise OptionError(f"task {missing[0]!r} is unknown; expected one of {', '.join(known[:8])}")


def _remedy(names: Sequence[str], manager: Any) -> str:
    """How the questions of tasks of a hub data set come into its cache."""
    sources = dict.fromkeys(found for name in names for found in _sources(name, manager))
    if not sources:
        return ""
    calls = "; ".join(f"load_dataset({source})" for source in sources)
    return (
        f"; to get them, once online: HF_HUB_OFFLINE=0 python -c "
        f'"from datasets import load_dataset; {calls}"'
    )


def _sources(name: str, manager: Any) -> Iterator[str]:
    """Hub data sets behind a task or a group, as arguments of `load_dataset`."""
    config = _config(name, manager)
    path = config.get("dataset_path")
    # a folder or one of datasets' own readers has no place on the hub
    if isinstance(path, str) and path.count("/") == 1 and not Path(path).exists():
        yield ", ".join(repr(part) for part in (path, config.get("dataset_name")) if part)
    for part in _parts(name, manager):
        yield from _sources(part, manager)


def _parts(name: str, manager: Any) -> list[str]:
    """The tasks and groups that a group names."""
    parts = _config(name, manager).get("task")
    named = [
        part.get("task") if isinstance(part, dict) else part
        for part in (parts if isinstance(parts, list) else ())
    ]
    return [part for part in named if isinstance(part, str)]


def _config(name: str, manager: Any) -> dict[str, Any]:
    known = isinstance(manager.task_index.get(name, {}).get("yaml_path"), str)
    return dict(manager._get_config(name)) if known else {}


def evaluate(model: Any, tasks: Sequence[Any], questions: int | None = None) -> dict[str, Any]:
    """Run `model` on `tasks` and let lmms-eval score it.

    Args:
        model: a `vtc.evaluation.model.Vtc`.
        tasks: from `load_tasks`.
        questions: the first so many of each task; None: all.

    Returns:
        lmms-eval's results, with `samples`; of several processes, empty in all but the first.

    Raises:
        SampleError: a sample failed; there are no results then.
        VtcError: lmms-eval stopped, gave none, or not as many samples as questions.
    """
    from lmms_eval.evaluator import simple_evaluate
    from lmms_eval.tasks import TaskManager

    try:
        results = simple_evaluate(
            model=model,
            tasks=list(tasks),
            # the tasks are loaded; without this one, all of lmms-eval's are indexed again (5 s)
            task_manager=TaskManager(include_defaults=False),
            limit=questions,
            bootstrap_iters=0,
            process_docs_parallel=1,
        )
    except VtcError:
        raise
    except Exception as error:
        raise VtcError(f"lmms-eval stopped: {type(error).__name__}: {error}") from error
    if int(os.environ.get("RANK", 0)) > 0:
        return {}
    if not results or not results.get("samples"):
        raise VtcError("lmms-eval returned no samples, so there is nothing to report")
    for task, samples in results["samples"].items():
        expected = results["n-samples"][task]["effective"]
        if len(samples) != expected:
            raise VtcError(
                f"lmms-eval scored {len(samples)} of {expected} questions of {task}, so no "
                f"accuracy is reported"
            )
    return dict(results)


def flat_sample(task: str, sample: Mapping[str, Any], metric: str | None = None) -> dict[str, Any]:
    """One line of our samples file: the question, the answer, its score and what it cost.

    Args:
        task: name of the task.
        sample: as lmms-eval logs it.
        metric: the key of the score; None: the first number among the task's metrics.

    Raises:
        VtcError: lmms-eval gave no number for this sample, or one that is no share of a right
            answer.
    """
    doc = sample.get("doc", {})
    return {
        "task": task,
        "doc_id": sample["doc_id"],
        "kind": doc.get("kind"),
        "question": doc.get("question"),
        "target": sample["target"],
        "answer": sample["filtered_resps"][0],
        "score": _score(task, sample, metric),
        **(sample["token_counts"][0] or {}),
    }


_PREFERRED = ("accuracy", "exact_match", "score", "anls", "relaxed_overall")
_ROUNDING = 1e-6
_NOT_METRICS = ("doc_id", "doc", "target", "arguments", "resps", "filtered_resps", "token_counts")


def _score(task: str, sample: Mapping[str, Any], metric: str | None) -> float:
    others = [key for key in sample if key not in (*_PREFERRED, *_NOT_METRICS)]
    for name in (metric,) if metric else (*_PREFERRED, *others):
        value = sample.get(name)
        # several stock tasks (POPE, MME) log a record with the score in it
        value = value.get("score") if isinstance(value, dict) else value
        if isinstance(value, (bool, int, float)):
            # a share of right answers is made of these; a sum of thirds may end a little above 1
            if not -_ROUNDING <= value <= 1 + _ROUNDING:
                raise VtcError(
                    f"task {task} gave {name}={value} for question {sample['doc_id']}, expected a "
                    "score from 0 to 1; name another one as metric"
                )
            return float(value)
    raise VtcError(
        f"task {task} gave no number for question {sample['doc_id']}, expected one per sample"
    )
