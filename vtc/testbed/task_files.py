"""The testbed as a folder of lmms-eval tasks: task files from the package, questions as parquet."""

from __future__ import annotations

import io
from collections.abc import Sequence
from functools import partial
from importlib import resources
from pathlib import Path
from typing import Any

from PIL import Image

from vtc.testbed.examples import Example, examples
from vtc.testbed.parquet import parquet_bytes
from vtc.testbed.vocabulary import CAPTION, CLIP_KINDS, PAIR_KINDS


def write_tasks(folder: str | Path, questions: int = 2000) -> Path:
    """Write the testbed's tasks for `lmms-eval --include_path`.

    `vtc_scenes` asks about single pictures; `vtc_scenes_blank` asks the same about a gray one: what
    can be guessed. `vtc_captions`, `vtc_pairs` (two pictures) and `vtc_videos` (four frames) have a
    question for every eight of the others; the last two are for families that were trained on
    them. A file that is there already with the same content stays untouched.

    Args:
        folder: made if needed.
        questions: how many of the test split.

    Returns:
        The folder.

    Raises:
        VtcError: the `eval` extra is not installed.
    """
    folder = Path(folder)
    fewer = -(-questions // 8)
    found = {
        "vtc_scenes.parquet": _parquet(examples(questions)),
        "vtc_captions.parquet": _parquet(examples(fewer, kinds=[CAPTION])),
        "vtc_pairs.parquet": _parquet(examples(fewer, kinds=[*PAIR_KINDS]), several=True),
        "vtc_videos.parquet": _parquet(examples(fewer, kinds=[*CLIP_KINDS]), several=True),
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


def _parquet(found: Sequence[Example], several: bool = False) -> bytes:
    """Questions about one picture each, or about `several`: the columns are lists then."""
    shown = [[_png(picture) for picture in e.video or e.images] for e in found]
    evidence = [[[list(box) for box in of_one] for of_one in e.boxes] for e in found]
    columns = {
        **({"images": shown} if several else {"image": [pictures[0] for pictures in shown]}),
        "question": [e.question for e in found],
        "answer": [e.answer for e in found],
        "kind": [e.kind for e in found],
        "evidence": evidence if several else [of_all[0] for of_all in evidence],
    }
    return parquet_bytes(columns, partial(_features, several))


def _features(several: bool, datasets: Any) -> dict[str, Any]:
    boxes = datasets.List(datasets.List(datasets.Value("int64")))
    picture = datasets.Image()
    return {
        **({"images": datasets.List(picture)} if several else {"image": picture}),
        "question": datasets.Value("string"),
        "answer": datasets.Value("string"),
        "kind": datasets.Value("string"),
        "evidence": datasets.List(boxes) if several else boxes,
    }


def _png(picture: Image.Image) -> dict[str, bytes | None]:
    """As datasets stores a picture."""
    buffer = io.BytesIO()
    picture.save(buffer, "PNG")
    return {"bytes": buffer.getvalue(), "path": None}
