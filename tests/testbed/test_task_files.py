"""The folder of lmms-eval tasks: the same questions as `examples`, written once, scored fairly."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from vtc.testbed import examples, scoring, write_tasks

pytestmark = pytest.mark.eval
datasets = pytest.importorskip("datasets", reason="needs the eval extra")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tasks(tmp_path_factory.mktemp("tasks"), 24)


def rows(path: Path) -> list[dict[str, Any]]:
    import pyarrow.parquet as pq

    found: list[dict[str, Any]] = pq.read_table(path).to_pylist()
    return found


def test_questions_are_those_of_examples(folder: Path) -> None:
    for name, wanted in (
        ("vtc_scenes", examples(24)),
        ("vtc_captions", examples(3, kinds=["caption"])),
    ):
        found = rows(folder / f"{name}.parquet")
        assert len(found) == len(wanted)
        for row, example in zip(found, wanted, strict=True):
            assert Image.open(io.BytesIO(row["image"]["bytes"])).tobytes() == (
                example.image.tobytes()
            )
            assert [tuple(box) for box in row["evidence"]] == list(example.evidence)
            for column in ("question", "answer", "kind"):
                assert row[column] == getattr(example, column)


@pytest.mark.parametrize(
    "name, kinds", [("vtc_pairs", ["difference"]), ("vtc_videos", ["change", "motion"])]
)
def test_questions_about_several_pictures(folder: Path, name: str, kinds: list[str]) -> None:
    found, wanted = rows(folder / f"{name}.parquet"), examples(3, kinds=kinds)
    for row, example in zip(found, wanted, strict=True):
        shown = [Image.open(io.BytesIO(image["bytes"])) for image in row["images"]]
        assert [p.tobytes() for p in shown] == [
            p.tobytes() for p in example.video or example.images
        ]
        assert row["evidence"] == [[list(box) for box in of_one] for of_one in example.boxes]
        assert (row["question"], row["answer"]) == (example.question, example.answer)


def test_the_frames_of_a_clip_are_one_video() -> None:
    (message,) = scoring.clip({"images": ["a", "b"], "question": "what moves?"})
    assert message["content"] == [
        {"type": "video", "url": ["a", "b"]},
        {"type": "text", "text": "what moves?"},
    ]


def test_writing_again_touches_nothing(folder: Path) -> None:
    before = {p: p.stat().st_mtime_ns for p in folder.iterdir()}
    assert write_tasks(folder, 24) == folder
    assert before == {p: p.stat().st_mtime_ns for p in folder.iterdir()}


def test_fewer_questions_are_the_first_of_more(folder: Path, tmp_path: Path) -> None:
    fewer = rows(write_tasks(tmp_path, 8) / "vtc_scenes.parquet")
    assert fewer == rows(folder / "vtc_scenes.parquet")[:8]


@pytest.mark.parametrize(
    "said, right", [("red", 1), (" Red.", 1), ("red\n", 1), ("blue", 0), ("", 0), ("red red", 0)]
)
def test_one_word(said: str, right: int) -> None:
    found = scoring.one_word({"answer": "red", "kind": "color"}, [said])
    assert found == {"accuracy": right, "accuracy_color": right}


@pytest.mark.parametrize(
    "said, exact, f1",
    [
        ("red star, blue ring", 1, 1),
        ("blue ring, red star", 0, 1),
        ("red star", 0, 2 / 3),
        ("red star, red star, blue ring", 0, 0.8),
        ("red ring", 0, 0),
        ("", 0, 0),
    ],
)
def test_caption(said: str, exact: float, f1: float) -> None:
    found = scoring.caption({"answer": "red star, blue ring", "kind": "caption"}, [said])
    assert found == pytest.approx({"accuracy": exact, "objects_f1": f1})


def test_blank_is_one_gray_picture() -> None:
    (image,) = scoring.blank({"question": "what color is the star?"})
    assert image.size == (112, 112) and len(image.getcolors()) == 1
