"""lmms-eval task files that point its stock task code at local copies of its data sets.

Only where the questions come from is replaced; prompts, scoring and aggregation stay lmms-eval's.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from vtc.errors import InputError, OptionError
from vtc.evaluation.benchmarks import BENCHMARKS, benchmark
from vtc.evaluation.local_copies import LocalCopy, Part, folder_of, local_copy

GROUP = "vtc_local"
_GQA_MODULE = "gqa_pictures"


def find_copies(root: Path, names: Sequence[str] = ()) -> tuple[list[LocalCopy], list[str]]:
    """Local copies under a folder.

    Args:
        root: `root/<task's or data set's name>/...`, or the hub's cache of data sets.
        names: of benchmarks, each of which must be there; none: whatever is there.

    Returns:
        The copies, and a sentence for each benchmark that shares a data set with one of them and
        whose split is not there.

    Raises:
        OptionError: an unknown name.
        InputError: a copy is missing, incomplete, or lacks a column; there is none at all.
    """
    if names:
        return [local_copy(_required(root, name), benchmark(name)) for name in names], []
    found: list[LocalCopy] = []
    failed: dict[str, tuple[Path, InputError]] = {}
    for name, of in BENCHMARKS.items():
        if (folder := folder_of(root, of)) is None:
            continue
        try:
            found.append(local_copy(folder, of))
        except InputError as error:
            failed[name] = folder, error
    if not (found or failed):
        raise InputError(
            f"{str(root)!r} has no data set of a benchmark, expected folders such as pope, "
            f"textvqa_val or datasets--lmms-lab-encoder--POPE; see docs/benchmarks.md"
        )
    # several tasks read one data set: splits and columns of the others may be left away
    used = {folder_of(root, copy.benchmark) for copy in found}
    for folder, refusal in failed.values():
        if folder not in used:
            raise refusal
    return found, [f"left out: {refusal}" for _, refusal in failed.values()]


def task_files(
    copies: Sequence[LocalCopy], prompts: Mapping[str, Mapping[str, str]] | None = None
) -> dict[str, str]:
    """Contents of the task files by name.

    `<task>.yaml` has the stock task's name: `vtc sweep --include-path` finds it under that.
    `lmms-eval --include_path` prefers its own task of a name, so for it there are groups:
    `vtc_local` of all, `vtc_local_<task>` of each.

    Args:
        copies: from `find_copies`.
        prompts: `pre_prompt` and `post_prompt` by task, where the stock ones are replaced.

    Raises:
        OptionError: prompts of a task that is not among the copies.
    """
    prompts = prompts or {}
    if unknown := prompts.keys() - {copy.benchmark.name for copy in copies}:
        raise OptionError(f"prompts: got {sorted(unknown)[0]!r}, expected a task of the copies")
    files, entries = {}, []
    for copy in copies:
        name = copy.benchmark.name
        changes = _changes(copy, prompts.get(name))
        entries.append({"task": name, **changes})
        header = _header(copy)
        include = {"include": str(copy.benchmark.file), "task": name}
        files[f"{name}.yaml"] = header + _yaml({**include, **changes})
        own = {"group": f"{GROUP}_{name}", "task": entries[-1:]}
        files[f"{GROUP}_{name}.yaml"] = header + _yaml(own)
        if copy.pictures is not None:
            files[f"{_GQA_MODULE}.py"] = _gqa_module(copy.pictures)
    files[f"{GROUP}.yaml"] = _yaml({"group": GROUP, "task": entries})
    return files


def write_local_tasks(
    root: Path,
    out: Path,
    names: Sequence[str] = (),
    prompts: Mapping[str, Mapping[str, str]] | None = None,
) -> list[LocalCopy]:
    """Write the task files of the copies under `root` into the folder `out`, made if needed.

    Raises:
        OptionError, InputError: see `find_copies` and `task_files`.
    """
    copies, _ = find_copies(root.absolute(), names)
    out.mkdir(parents=True, exist_ok=True)
    for name, content in task_files(copies, prompts).items():
        (out / name).write_text(content, encoding="utf-8")
    return copies


def with_pictures(questions: Any, source: Sequence[str]) -> Any:
    """GQA's questions with the picture of each; the stock code would ask the hub for them.

    Args:
        questions: a `datasets.Dataset` with `imageId`.
        source: parquet files with `id` and `image`, or the one folder that `save_to_disk` wrote.

    Raises:
        InputError: a question's picture is not there.
    """
    from datasets import Features, Image, load_dataset, load_from_disk

    if Path(source[0]).is_dir():
        pictures = load_from_disk(source[0])["testdev"]
    else:
        pictures = load_dataset("parquet", data_files={"testdev": list(source)}, split="testdev")
    place = {name: i for i, name in enumerate(pictures["id"])}
    if missing := sorted({*questions["imageId"]} - place.keys()):
        raise InputError(
            f"gqa: picture {missing[0]!r} of a question is not among the {len(place)} of "
            f"{source[0]!r}, expected all; copy the data set again"
        )
    # as files, so that nothing is decoded and encoded anew
    pictures = pictures.cast_column("image", Image(decode=False))

    def add(rows: dict[str, list[Any]]) -> dict[str, list[Any]]:
        return {"image": [pictures[place[name]]["image"] for name in rows["imageId"]]}

    features = Features({**questions.features, "image": Image()})
    return questions.map(add, batched=True, batch_size=64, features=features)


def _required(root: Path, name: str) -> Path:
    of = benchmark(name)
    if (folder := folder_of(root, of)) is None:
        raise InputError(
            f"{name}: {str(root)!r} has no folder {name!r}, expected a copy of {of.dataset} in it; "
            f"fetch it with: hf download {of.dataset} --repo-type dataset --local-dir {root}/{name}"
        )
    return folder


def _changes(copy: LocalCopy, prompts: Mapping[str, str] | None) -> dict[str, Any]:
    changes = copy.config
    if copy.benchmark.name == "gqa":
        joined = copy.pictures is None
        changes["process_docs"] = None if joined else _Function(f"{_GQA_MODULE}.joined")
    if prompts is not None:
        stock = copy.benchmark.config.get("lmms_eval_specific_kwargs", {}).get("default", {})
        changes["lmms_eval_specific_kwargs"] = {"default": {**stock, **prompts}}
    return changes


def _header(copy: LocalCopy) -> str:
    """Sizes, so that the files change with the data: a sweep runs finished cells again then."""
    parts = [part for part in (copy.questions, copy.pictures) if part is not None]
    files = [file for part in parts for file in part.files or sorted(part.folder.rglob("*.arrow"))]
    sizes = "".join(f"# {file.stat().st_size:>12} bytes  {file}\n" for file in files)
    return f"# {copy.questions.rows} questions\n{sizes}"


def _gqa_module(pictures: Part) -> str:
    source = [str(file) for file in pictures.files] or [str(pictures.folder)]
    return (
        '"""The pictures of GQA, from a local copy; the task file names `joined`."""\n\n'
        "from vtc.evaluation.local_tasks import with_pictures\n\n"
        f"SOURCE = {source!r}\n\n\n"
        "def joined(questions):\n"
        '    """Questions with the column `image`."""\n'
        "    return with_pictures(questions, SOURCE)\n"
    )


class _Function(str):
    """A function that lmms-eval imports when it reads the file."""


def _yaml(content: Mapping[str, Any]) -> str:
    import yaml

    class Dumper(yaml.SafeDumper):
        pass

    Dumper.add_representer(
        _Function, lambda dumper, name: dumper.represent_scalar("!function", str(name))
    )
    Dumper.ignore_aliases = lambda self, data: True  # type: ignore[method-assign]
    return yaml.dump(dict(content), Dumper=Dumper, sort_keys=False, allow_unicode=True, width=1000)
