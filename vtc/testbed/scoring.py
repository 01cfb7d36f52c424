"""How answers to the testbed's questions are scored; lmms-eval's task files point here."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import Any

from PIL import Image

from vtc.testbed.scenes import SIZE

GRAY = (127, 127, 127)


def one_word(doc: Mapping[str, Any], results: list[str]) -> dict[str, float]:
    """Right or wrong, overall and under the kind; case, space and a full stop are free."""
    right = float(_plain(results[0]) == _plain(doc["answer"]))
    return {"accuracy": right, f"accuracy_{doc['kind']}": right}


def caption(doc: Mapping[str, Any], results: list[str]) -> dict[str, float]:
    """Word for word, and F1 of the objects named, whatever their order."""
    said, true = (Counter(_objects(text)) for text in (results[0], doc["answer"]))
    both = (said & true).total()
    return {
        "accuracy": float(_plain(results[0]) == _plain(doc["answer"])),
        "objects_f1": 2 * both / (said.total() + true.total()) if said else 0.0,
    }


def blank(doc: Mapping[str, Any]) -> list[Image.Image]:
    """A gray picture in place of the question's."""
    return [gray()]


def gray() -> Image.Image:
    """A picture that shows nothing."""
    return Image.new("RGB", (SIZE, SIZE), GRAY)


def pictures(doc: Mapping[str, Any]) -> list[Image.Image]:
    """All pictures of a question, or the frames of its clip."""
    return list(doc["images"])


def clip(doc: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The chat of a question about a clip: its frames as one video."""
    video = {"type": "video", "url": pictures(doc)}
    return [{"role": "user", "content": [video, {"type": "text", "text": doc["question"]}]}]


def without_evidence(questions: Any) -> Any:
    """The same questions, with nothing to look for in the picture."""
    return questions.remove_columns("evidence")


def _plain(text: str) -> str:
    return " ".join(text.lower().split()).removesuffix(".")


def _objects(text: str) -> list[str]:
    return [part for part in _plain(text).replace(" ,", ",").split(", ") if part]
