"""Real benchmarks by their lmms-eval names: what their data holds, and whether it is here.

Data set, config, split and metrics are read from the task files of the installed lmms-eval; the
columns are those that its code reads.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from vtc.errors import OptionError, VtcError

# from 0.7.3 on lmms-eval takes its picture data sets from the second; copies may have either name
ORGANIZATIONS = ("lmms-lab-encoder", "lmms-lab")
GQA_PICTURES = "testdev_balanced_images"


@dataclass(frozen=True)
class Benchmark:
    """A benchmark as lmms-eval runs it.

    Attributes:
        name: of the task; its file in the installed lmms-eval has the same.
        columns: what the task's code reads of a question, beside `image`.
        questions: how many the published split has (not counted here); None: not known.
        note: what to know before a run.
    """

    name: str
    columns: tuple[str, ...]
    questions: int | None = None
    note: str = ""

    @cached_property
    def file(self) -> Path:
        """The installed task file."""
        return _installed(self.name)

    @cached_property
    def config(self) -> dict[str, Any]:
        """The installed task file and what it includes; functions are left unread."""
        file = self.file  # says what to install where lmms-eval is not
        from lmms_eval.utils import load_yaml_config

        found: dict[str, Any] = load_yaml_config(str(file), mode="simple")
        return found

    @property
    def dataset(self) -> str:
        """The data set's hub id."""
        return str(self.config["dataset_path"])

    @property
    def subset(self) -> str | None:
        """The config of the data set, if it has several."""
        return self.config.get("dataset_name")

    @property
    def split(self) -> str:
        """The split whose questions are asked."""
        return str(self.config["test_split"]).strip()

    @property
    def metrics(self) -> tuple[str, ...]:
        """What lmms-eval reports; files for a server are no metric."""
        named = (metric["metric"] for metric in self.config["metric_list"])
        return tuple(name for name in named if name != "submission")

    @property
    def ids(self) -> tuple[str, ...]:
        """Hub ids under which the same data is found, the installed lmms-eval's first."""
        owner, _, name = self.dataset.partition("/")
        others = [o for o in ORGANIZATIONS if o != owner] if owner in ORGANIZATIONS else []
        return tuple(f"{o}/{name}" for o in (owner, *others))


_PAIRED = "an even number of questions only: two belong together"
_LONG = "sets no max_new_tokens: with lmms-eval add --gen_kwargs max_new_tokens=16"
_CAPTIONS = "asks for a description of a region; its metrics need Java"
_BOXES = "asks for a box as text; one question per description, so more than rows"
_ANSWERS = ("question_id", "question", "answers")
_CHOICES = ("index", "hint", "A", "B", "C", "D", "category", "L2-category", "source", "split")

_GENERAL = (
    Benchmark(
        "pope",
        ("question_id", "question", "answer"),
        9000,
        '"Yes." is wrong: only the bare word counts; yes_ratio is that of the truth',
    ),
    Benchmark("textvqa_val", _ANSWERS, 5000, _LONG),
    Benchmark(
        "gqa", ("question", "answer", "imageId"), 12578, "pictures are a config of their own"
    ),
    Benchmark("mme", ("question_id", "question", "answer", "category"), 2374, _PAIRED),
    Benchmark(
        "mmbench_en_dev_static",
        ("question", "answer", *_CHOICES),
        4329,
        "answers are read by rules; mmbench_en_dev asks a paid API",
    ),
    Benchmark("scienceqa_img", ("question", "choices", "answer", "hint"), 2017),
    Benchmark("chartqa", ("question", "answer", "type"), 2500),
    Benchmark("docvqa_val", ("question", "answers"), 5349),
    Benchmark("vqav2_val", _ANSWERS, 214354),
    Benchmark("vizwiz_vqa_val", _ANSWERS, 4319, _LONG),
    Benchmark(
        "ocrbench",
        ("question", "answer", "dataset", "question_type"),
        1000,
        "its total adds up over the runs of one process: one run each, or read the samples",
    ),
)
_REFERRING = {
    "refcoco": {"val": 8811, "test": 5000, "testA": 1975, "testB": 1810},
    "refcoco+": {"val": 3805, "testA": 1975, "testB": 1798},
    "refcocog": {"val": 7573, "test": 5023},
}
_REFERRING_KINDS = {
    "bbox_rec": (("question_id", "answer", "bbox"), f"{_BOXES}; {_LONG}"),
    "bbox": (("question_id", "answer", "bbox"), f"{_CAPTIONS}; {_LONG}"),
    "seg": (("question_id", "answer", "segmentation"), f"{_CAPTIONS}; {_LONG}"),
}
BENCHMARKS: dict[str, Benchmark] = {
    benchmark.name: benchmark
    for benchmark in (
        *_GENERAL,
        *(
            Benchmark(f"{family}_{kind}_{split}", columns, count, note)
            for kind, (columns, note) in _REFERRING_KINDS.items()
            for family, splits in _REFERRING.items()
            for split, count in splits.items()
        ),
    )
}


def benchmark(name: str) -> Benchmark:
    """The benchmark of a name.

    Raises:
        OptionError: none of those known here; lmms-eval may have it all the same.
    """
    if name not in BENCHMARKS:
        known = ", ".join(of.name for of in _GENERAL)
        raise OptionError(
            f"benchmark {name!r} is unknown; expected one of {known}, or a task of RefCOCO, "
            f"RefCOCO+ or RefCOCOg as `vtc tasks --list` names it"
        )
    return BENCHMARKS[name]


def commands(
    name: str, include: Path | None = None, group: str | None = None, model: str = "MODEL"
) -> tuple[str, str]:
    """How to run a benchmark with the `lmms-eval` command and with `vtc sweep`.

    Args:
        name: of one benchmark, or of several with spaces in between.
        include: a folder of task files.
        group: what `lmms-eval` calls them in that folder.
        model: a folder or a hub id.
    """
    at = (f" --include_path {include}", f" --include-path {include}") if include else ("", "")
    tasks = group or name.replace(" ", ",")
    return (
        f"lmms-eval --model vtc --model_args pretrained={model},method=vtc_cls,keep=0.111 "
        f"--tasks {tasks}{at[0]} --batch_size 1 --log_samples --output_path out/{tasks}",
        f"vtc sweep --model {model}{at[1]} --tasks {name}",
    )


def availability(of: Benchmark) -> str:
    """Whether the stock task runs offline now, or else what is there; a look at folders only."""
    subsets = (of.subset, GQA_PICTURES) if of.name == "gqa" else (of.subset,)
    for id_ in of.ids:
        if all(_prepared(id_, subset, of.split) for subset in subsets):
            if id_ == of.dataset:
                return "ready"
            return f"prepared under the older name {id_}: fetch it again, or vtc tasks --data"
    for id_ in of.ids:
        if (hub := _hub_folder(id_)).is_dir():
            return f"downloaded, not prepared: vtc tasks --data {hub.parent} --tasks {of.name}"
    return "not in the cache"


def _prepared(id_: str, subset: str | None, split: str) -> bool:
    """Whether `load_dataset` has written the split's Arrow files before."""
    from datasets.naming import camelcase_to_snakecase

    owner, _, name = id_.partition("/")
    root = _datasets_cache() / f"{owner}___{camelcase_to_snakecase(name)}" / (subset or "default")
    return any(root.glob(f"*/*/*-{split}*.arrow"))


def _datasets_cache() -> Path:
    """As lmms-eval looks for it."""
    home = os.environ.get("HF_HOME", "~/.cache/huggingface")
    named = os.environ.get("LMMS_EVAL_DATASETS_CACHE") or os.environ.get("HF_DATASETS_CACHE")
    return Path(named or Path(home) / "datasets").expanduser()


def _hub_folder(id_: str) -> Path:
    from huggingface_hub.constants import HF_HUB_CACHE

    return Path(HF_HUB_CACHE) / f"datasets--{id_.replace('/', '--')}"


def _installed(name: str) -> Path:
    """The task file of that name in the installed lmms-eval, found without reading all of them."""
    spec = importlib.util.find_spec("lmms_eval")
    if spec is None or not spec.submodule_search_locations:
        raise VtcError(
            "lmms_eval is not installed, expected the eval extra; "
            "pip install 'visual-token-compression[eval]'"
        )
    folders: Sequence[str] = spec.submodule_search_locations
    found = sorted(Path(folders[0]).joinpath("tasks").rglob(f"{name}.yaml"))
    if not found:
        version = importlib.metadata.version("lmms-eval")
        raise VtcError(
            f"lmms-eval {version} has no task {name!r}, expected it as in 0.7.3; install a version "
            f">=0.7.3,<0.8"
        )
    return found[0]
