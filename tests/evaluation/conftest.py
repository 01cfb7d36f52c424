"""The trained testbed model, its tasks, samples made by hand, and one small sweep to read."""

from __future__ import annotations

import gc
import importlib
import importlib.util
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

# without the extra there is nothing to test here
collect_ignore_glob = [] if importlib.util.find_spec("lmms_eval") else ["test_*.py"]

QUESTIONS = 16


@pytest.fixture(scope="session", autouse=True)
def offline(tmp_path_factory):
    """No network, and datasets' cache in a folder of the tests."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HF_HUB_OFFLINE", "1")
        import datasets

        patch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("datasets"))
        yield


@pytest.fixture(scope="session", autouse=True)
def libraries_stay(offline):
    """What tables and sweeps import is there from now on, as what tests import is after collection:
    statsmodels looks for garbage at every correction of p-values."""
    from vtc.evaluation.evaluate import quiet

    with quiet():
        for name in ("lmms_eval.evaluator", "matplotlib.pyplot", "statsmodels.stats.multitest"):
            importlib.import_module(name)
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session")
def model_name() -> str:
    from vtc.testbed import model_folder

    return str(model_folder())


@pytest.fixture(scope="session")
def loaded(model_name):
    from vtc.evaluation.loading import load

    return load(model_name, "cpu")


@pytest.fixture(scope="session")
def tasks_folder(tmp_path_factory) -> Path:
    from vtc.testbed import write_tasks

    return write_tasks(tmp_path_factory.mktemp("testbed") / "tasks", QUESTIONS)


@pytest.fixture(scope="session")
def scenes(tasks_folder):
    """The task `vtc_scenes`, loaded."""
    from vtc.evaluation.evaluate import load_tasks, quiet

    with quiet():
        return load_tasks(("vtc_scenes",), tasks_folder)


@pytest.fixture(scope="session")
def answer(loaded, scenes):
    """Samples of `vtc_scenes` under the model `vtc` with the given arguments, through lmms-eval."""
    from vtc.evaluation.evaluate import evaluate, flat_sample, quiet
    from vtc.evaluation.model import Vtc

    def run(questions: int = QUESTIONS, **arguments: Any) -> list[dict[str, Any]]:
        with quiet():
            results = evaluate(Vtc(loaded, **arguments), scenes, questions)
        return [flat_sample("vtc_scenes", sample) for sample in results["samples"]["vtc_scenes"]]

    return run


@pytest.fixture(scope="session")
def broken_tasks(tasks_folder, tmp_path_factory) -> Path:
    """The tasks with one question that cannot be asked: it names a second picture."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    folder = tmp_path_factory.mktemp("broken")
    for file in tasks_folder.iterdir():
        if file.is_file():
            (folder / file.name).write_bytes(file.read_bytes())
    table = pq.read_table(folder / "vtc_scenes.parquet")
    texts = table["question"].to_pylist()
    texts[3] = "<image> what is different?"
    column = table.column_names.index("question")
    table = table.set_column(column, "question", pa.array(texts))
    pq.write_table(table, folder / "vtc_scenes.parquet")
    return folder


@pytest.fixture(scope="session")
def sweep(model_name, tasks_folder):
    """Runs or resumes a small sweep; arguments replace the settings."""
    from vtc.evaluation.sweep import SweepConfig, run

    def start(out: Path, **changes: Any) -> Any:
        given = {
            "models": (model_name,),
            "include_path": tasks_folder,
            "device": "cpu",
            "keeps": (0.11,),
            "positions": ("keep",),
            "questions": 8,
            "seeds": (0,),
            "batch_size": 8,
            "timed_samples": 1,
            "pictures": 0,
            "workers": 1,
        }
        return run(SweepConfig(out=out, **given | changes))

    return start


@pytest.fixture(scope="session")
def swept(sweep, tmp_path_factory):
    """A finished sweep over two budgets, two policies and two seeds."""
    return sweep(
        tmp_path_factory.mktemp("swept") / "out",
        keeps=(0.33, 0.11),
        positions=("keep", "renumber"),
        questions=QUESTIONS,
        seeds=(0, 1),
        timed_samples=3,
        pictures=2,
        command="vtc sweep --questions 16",
    )


@pytest.fixture
def samples_frame():
    """A frame of samples made by hand: scores by (method, positions, keep, seed).

    A method is written as on the command line; one that skips work keeps every token.
    """
    from vtc.evaluation import table
    from vtc.evaluation.compression import Compression, parse_method

    def build(
        cells: Mapping[tuple[Any, ...], Sequence[float]], task: str = "t", model: str = "m"
    ) -> Any:
        found = []
        for (method, positions, keep, seed), scores in cells.items():
            name, options = parse_method(method)
            cell = Compression(name, keep, positions, seed, options)
            active = keep if isinstance(keep, float) else 1.0
            kept = 1.0 if cell.build().site == "llm_rows" else active
            shares = {"kept_fraction": kept, "active_fraction": active}
            samples = [
                {"task": task, "doc_id": i, "kind": None, "score": s, **shares}
                for i, s in enumerate(scores)
            ]
            found.append((model, cell, samples))
        return table.samples_frame(found)

    return build
