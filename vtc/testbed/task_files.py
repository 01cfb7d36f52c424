"""The testbed as a folder of lmms-eval tasks: task files from the package, questions as parquet."""

from __future__ import annotations

import io
from collections.abc import Sequence
from importlib import resources
from pathlib import Path

from vtc.errors import VtcError
from vtc.testbed.examples import Example, examples
from vtc.testbed.vocabulary import CAPTION


def write_tasks(folder: str | Path, questions: int = 2000) -> Path:
    """Write `vtc_scenes`, `vtc_scenes_blank` and `vtc_captions` for `lmms-eval --include_path`.

    `vtc_scenes_blank` asks the same questions about a gray picture: what can be guessed.
    `vtc_captions` has a question for every eight of the others. A file that is there already with
    the same content stays untouched.

    Args:
        folder: made if needed.
        questions: how many of the test split.

    Returns:
        The folder.

    Raises:
        VtcError: the `eval` extra is not installed.
    """
    folder = Path(folder)
    found = {
        "vtc_scenes.parquet": _parquet(examples(questions)),
        "vtc_captions.parquet": _parquet(examples(-(-questions // 8), kinds=[CAPTION])),
    }
    for source in resources.files("vtc.testbed").joinpath("tasks").iterdir():
        if source.name.endswith((".yaml", ".py")):
            found[source.name] = source.read_bytes()
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in found.items():
        path = folder / name
        # a rewritten file would be read into datasets' cache anew
        if not path.is_file() or path.read_bytes() != content:
            path.write_bytes(content)
    return folder


def _parquet(found: Sequence[Example]) -> bytes:
    try:
        import datasets
        import pyarrow
        from pyarrow import parquet
    except ImportError as error:
        raise VtcError(
            f"{error.name} is not installed, expected the eval extra; "
            f"pip install 'visual-token-compression[eval]'"
        ) from None
    features = datasets.Features(
        {
            "image": datasets.Image(),
            "question": datasets.Value("string"),
            "answer": datasets.Value("string"),
            "kind": datasets.Value("string"),
            "evidence": datasets.List(datasets.List(datasets.Value("int64"))),
        }
    )
    columns = {
        "image": [{"bytes": _png(e), "path": None} for e in found],
        "question": [e.question for e in found],
        "answer": [e.answer for e in found],
        "kind": [e.kind for e in found],
        "evidence": [[list(box) for box in e.evidence] for e in found],
    }
    buffer = io.BytesIO()
    # the schema says which column is a picture
    parquet.write_table(pyarrow.Table.from_pydict(columns, features.arrow_schema), buffer)
    return buffer.getvalue()


def _png(example: Example) -> bytes:
    buffer = io.BytesIO()
    example.image.save(buffer, "PNG")
    return buffer.getvalue()
