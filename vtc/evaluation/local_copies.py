"""Local copies of the data sets of benchmarks: where they lie, and whether they are whole."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vtc.errors import InputError
from vtc.evaluation.benchmarks import GQA_PICTURES, Benchmark

_SHARD = re.compile(r"-(\d{5})-of-(\d{5})$")


@dataclass(frozen=True)
class Part:
    """One split on this disk.

    Attributes:
        files: parquet files; none if it was written by `save_to_disk`.
        folder: of the files, or the one that `save_to_disk` wrote.
        columns: names.
        rows: how many.
    """

    files: tuple[Path, ...]
    folder: Path
    columns: tuple[str, ...]
    rows: int

    @property
    def config(self) -> dict[str, Any]:
        """Where to read it, as `dataset_path` and its arguments; the split comes as `files`."""
        if not self.files:
            return {"dataset_path": str(self.folder), "dataset_kwargs": {"load_from_disk": True}}
        return {"dataset_path": "parquet", "dataset_kwargs": {"data_files": {}}}


@dataclass(frozen=True)
class LocalCopy:
    """The questions of a benchmark, and the part of GQA that holds its pictures."""

    benchmark: Benchmark
    questions: Part
    pictures: Part | None = None

    @property
    def config(self) -> dict[str, Any]:
        """What replaces the data set of the stock task."""
        found = self.questions.config
        if self.questions.files:
            files = [str(file) for file in self.questions.files]
            found["dataset_kwargs"] = {"data_files": {self.benchmark.split: files}}
        return {"dataset_name": None, **found}


def folder_of(root: Path, of: Benchmark) -> Path | None:
    """The folder of a benchmark under `root`, by the task's or the data set's name.

    Looked for in this order, small and capital letters alike: the task's name, the data set's, its
    hub id (`org/name`), and the form that the hub's cache has (`datasets--org--name`).

    Raises:
        InputError: `root` is no folder, or a cached data set has several snapshots.
    """
    if not root.is_dir():
        raise InputError(
            f"{str(root)!r} is not a folder, expected one with a folder for each data set; give "
            f"it with --data"
        )
    there = {child.name.lower(): child for child in sorted(root.iterdir()) if child.is_dir()}
    names = [of.name, *(id_.rpartition("/")[2] for id_ in of.ids)]
    for name in names:
        if (child := there.get(name.lower())) is not None:
            return child
    for id_ in of.ids:
        if (root / id_).is_dir():
            return root / id_
        if (child := there.get(f"datasets--{id_.replace('/', '--')}".lower())) is not None:
            return _snapshot(child)
    return None


def local_copy(folder: Path, of: Benchmark) -> LocalCopy:
    """What a folder holds of a benchmark.

    Raises:
        InputError: the split is not there or not whole, or lacks a column that the task reads.
    """
    questions = _part(folder, of, of.subset, of.split)
    # a copy of GQA may have its pictures joined already
    joined = "image" in questions.columns
    wanted = of.columns if of.name == "gqa" and not joined else (*of.columns, "image")
    if of.name == "gqa" and joined:
        wanted = tuple(column for column in wanted if column != "imageId")
    _require(questions, wanted, of)
    if of.name != "gqa" or joined:
        return LocalCopy(of, questions)
    pictures = _part(folder, of, GQA_PICTURES, of.split)
    _require(pictures, ("id", "image"), of)
    return LocalCopy(of, questions, pictures)


def _snapshot(cached: Path) -> Path:
    """The snapshot that `main` stands for, or the only one."""
    main = cached / "refs" / "main"
    if main.is_file() and (found := cached / "snapshots" / main.read_text().strip()).is_dir():
        return found
    snapshots = sorted(path for path in cached.glob("snapshots/*") if path.is_dir())
    if len(snapshots) != 1:
        raise InputError(
            f"{str(cached)!r} has {len(snapshots)} snapshots and none is named main, expected "
            f"one; download the data set again"
        )
    return snapshots[0]


def _part(folder: Path, of: Benchmark, subset: str | None, split: str) -> Part:
    for saved in (folder / subset, folder) if subset else (folder,):
        if (saved / "dataset_dict.json").is_file():
            return _saved(saved, of, split)
    if (folder / "state.json").is_file():
        raise InputError(
            f"{of.name}: {str(folder)!r} is a single Dataset, expected splits by name; write it "
            f"as DatasetDict({{{split!r}: dataset}}).save_to_disk(...)"
        )
    return _parquet(folder, of, subset, split)


def _saved(folder: Path, of: Benchmark, split: str) -> Part:
    """A split of what `DatasetDict.save_to_disk` wrote."""
    from datasets import load_from_disk

    try:
        found = load_from_disk(str(folder))
    except Exception as error:
        raise InputError(
            f"{of.name}: {str(folder)!r} cannot be read ({' '.join(str(error).split())}), "
            f"expected what save_to_disk writes; copy it again"
        ) from error
    if split not in found:
        raise _no_split(of, folder, split, list(found))
    return Part((), folder, tuple(found[split].column_names), found[split].num_rows)


def _parquet(folder: Path, of: Benchmark, subset: str | None, split: str) -> Part:
    """A split among parquet files: `<split>-*.parquet` or `<split>/*.parquet`, at any depth."""
    every = sorted(folder.rglob("*.parquet"))
    inside = [f for f in every if subset in f.relative_to(folder).parts[:-1]] if subset else every
    # copied by hand, files may lie outside of a folder of the config's name
    files = inside or ([] if subset == GQA_PICTURES else every)
    chosen = [file for file in files if _split(file, folder) == split]
    if not chosen:
        raise _no_split(of, folder, split, sorted({_split(file, folder) for file in files}), subset)
    if len(places := {file.parent for file in chosen}) > 1:
        raise InputError(
            f"{of.name}: split {split!r} lies in {' and in '.join(sorted(map(str, places)))}, "
            f"expected one of them; move the other away"
        )
    _require_all_shards(chosen, of)
    return Part(tuple(chosen), chosen[0].parent, *_schema(chosen, of))


def _split(file: Path, folder: Path) -> str:
    """The split that a file's name starts with; else the name of its folder."""
    stem, dash, rest = file.stem.partition("-")
    if (dash and rest) or file.parent == folder:
        return stem
    return file.parent.name if file.stem.isdecimal() or stem == "part" else stem


def _schema(files: Sequence[Path], of: Benchmark) -> tuple[tuple[str, ...], int]:
    """Columns and rows of files that belong together."""
    from pyarrow import ArrowException, parquet

    columns: tuple[str, ...] = ()
    rows = 0
    for file in files:
        try:
            metadata = parquet.read_metadata(file)
        except (ArrowException, OSError) as error:
            raise InputError(
                f"{of.name}: {str(file)!r} cannot be read ({' '.join(str(error).split())}), "
                f"expected a parquet file; copy it again (a pointer of Git LFS is not the file)"
            ) from error
        columns, rows = tuple(metadata.schema.to_arrow_schema().names), rows + metadata.num_rows
    return columns, rows


def _require_all_shards(files: Sequence[Path], of: Benchmark) -> None:
    """Half of a data set would give a score that looks like the whole one's."""
    marks = [mark for file in files if (mark := _SHARD.search(file.stem))]
    totals = {int(mark[2]) for mark in marks}
    if marks and (len(totals) > 1 or len(marks) != len(files) or len(files) != max(totals)):
        raise InputError(
            f"{of.name}: {str(files[0].parent)!r} has {len(files)} files of the split, expected "
            f"the {max(totals)} that their names speak of; copy the others too"
        )


def _require(part: Part, columns: Sequence[str], of: Benchmark) -> None:
    if missing := [column for column in columns if column not in part.columns]:
        raise InputError(
            f"{of.name}: {str(part.folder)!r} has the columns {', '.join(part.columns)}, expected "
            f"{', '.join(missing)} too; copy {of.dataset} as it is on the hub"
        )
    if not part.rows:
        raise InputError(f"{of.name}: {str(part.folder)!r} has no rows, expected questions")


def _no_split(
    of: Benchmark, folder: Path, split: str, found: Sequence[str], subset: str | None = None
) -> InputError:
    among = f" of config {subset!r}" if subset else ""
    return InputError(
        f"{of.name}: {str(folder)!r} has {', '.join(map(repr, found)) or 'no parquet file'}, "
        f"expected the split {split!r}{among} ({split}-*.parquet, or what save_to_disk writes); "
        f"copy {of.dataset} as it is on the hub"
    )
