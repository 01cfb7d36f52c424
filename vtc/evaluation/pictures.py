"""The same pictures under every method, side by side: what was kept, its scores, the answers."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import pandas as pd
from lmms_eval.protocol import ChatMessages
from PIL import Image

from vtc.evaluation.compression import FULL, RANDOM, Compression, build
from vtc.evaluation.evaluate import quiet
from vtc.evaluation.failures import Failure, failures
from vtc.evaluation.loading import Loaded
from vtc.evaluation.measure import boxes_of
from vtc.evaluation.printed import name, percent
from vtc.evaluation.rows import Row
from vtc.evaluation.statistics import RIGHT
from vtc.evaluation.table import pick
from vtc.viz import as_seen, last_left, overlay, score_map

KEEP = 0.11
# of methods that skip work, the budget nearest to half of the layers
ACTIVE = 0.5


@dataclass(frozen=True)
class Shown:
    """One picture under one method.

    Attributes:
        title: the method.
        image: what was kept.
        scores: the scores it was chosen by, if the method has any.
        answer: as it was scored.
        right: whether it was.
        kept: share of tokens kept, in words.
    """

    title: str
    image: Image.Image
    scores: Image.Image | None
    answer: str
    right: bool
    kept: str = ""


@dataclass(frozen=True)
class Example:
    """A question about a picture, and what each method made of it."""

    question: str
    target: str
    kind: str
    shown: list[Shown]


@dataclass(frozen=True)
class Broken:
    """A failure with its pictures: as it is, and what the method left of it."""

    failure: Failure
    question: str
    picture: Image.Image
    left: Image.Image


class Gallery:
    """Draws questions of one task under one model.

    Args:
        frame: samples of this model and task.
        rows: of the same, seeds averaged.
        loaded: the model.
        task: lmms-eval's, with its questions.
    """

    def __init__(self, frame: pd.DataFrame, rows: Sequence[Row], loaded: Loaded, task: Any) -> None:
        self._frame, self._rows, self._loaded, self._task = frame, rows, loaded, task
        self._shown = rows_to_show(rows, task.config.task)

    def examples(self, count: int) -> list[Example]:
        """The first question of each of the first `count` kinds that have one picture.

        Under the full model and every method that drops tokens.
        """
        rows = [row for row in self._shown if row["method"] == FULL or row["kept_fraction"] < 1]
        found = []
        for sample in self._firsts(count):
            shown = [self._show(row, int(sample["doc_id"])) for row in rows]
            kind = "" if pd.isna(sample["kind"]) else str(sample["kind"])
            found.append(Example(self._question(sample), str(sample["target"]), kind, shown))
        return found

    def failures(self, limit: int) -> list[Broken]:
        """What methods that drop tokens break, at the budget of the examples."""
        rows = [row for row in self._shown if row["method"] == FULL or row["kept_fraction"] < 1]
        docs = [
            doc for doc in self._frame["doc_id"].unique() if self._picture(int(doc)) is not None
        ]
        frame = self._frame[self._frame["doc_id"].isin(docs)]
        return [
            Broken(failure, self._question(failure.sample), *self._before_and_after(failure))
            for failure in failures(frame, self._rows, rows, limit)
        ]

    def layers(self) -> list[Shown]:
        """What decoder layers do with the first picture, under every method that changes it."""
        found: list[Shown] = []
        for sample in self._firsts(1):
            image = self._image(int(sample["doc_id"]))
            for row in self._shown:
                own = self._sample(row, int(sample["doc_id"]))
                with self._asked(own, row, image) as handle:
                    if handle.plans:
                        drawn = handle.plot(as_seen(image, self._loaded.processor))
                        answer, right = str(own["answer"]).strip(), bool(own["score"] >= RIGHT)
                        found.append(Shown(_titled(row), drawn, None, answer, right))
        return found

    def _firsts(self, count: int) -> list[dict[Any, Any]]:
        """The full model's samples of the first question of each kind that has one picture."""
        full = self._frame[self._frame["label"] == FULL]
        firsts = full.drop_duplicates("kind") if full["kind"].notna().any() else full
        found: list[dict[Any, Any]] = []
        for sample in firsts.to_dict("records"):
            if len(found) == count:
                break
            if self._picture(int(sample["doc_id"])) is not None:
                found.append(sample)
        return found

    def _show(self, row: Row, doc_id: int) -> Shown:
        sample, image = self._sample(row, doc_id), self._image(doc_id)
        seen = as_seen(image, self._loaded.processor)
        with self._asked(sample, row, image) as handle:
            left = last_left(handle.remaining)
            drawn = overlay(seen, left, evidence=self._boxes(doc_id, image, seen))
            scores = None if left.scores is None or row["method"] == FULL else score_map(seen, left)
        answer, kept = str(sample["answer"]).strip(), percent(sample.get("kept_fraction"), 1)
        return Shown(name(row), drawn, scores, answer, bool(sample["score"] >= RIGHT), kept)

    def _before_and_after(self, failure: Failure) -> tuple[Image.Image, Image.Image]:
        doc_id = int(failure.sample["doc_id"])
        image = self._image(doc_id)
        with self._asked(failure.sample, failure.row, image) as handle:
            seen = as_seen(image, self._loaded.processor)
            boxes = self._boxes(doc_id, image, seen)
            return seen, overlay(seen, last_left(handle.remaining), evidence=boxes)

    def _boxes(
        self, doc_id: int, image: Image.Image, seen: Image.Image
    ) -> list[tuple[float, float, float, float]]:
        """The evidence in pixels of the picture as the model saw it."""
        x, y = seen.width / image.width, seen.height / image.height
        boxes = boxes_of(self._task.eval_docs[doc_id])
        return [(x0 * x, y0 * y, x1 * x, y1 * y) for x0, y0, x1, y1 in boxes]

    def _picture(self, doc_id: int) -> Image.Image | None:
        """The picture of a question that has one and no more."""
        media = self._task.doc_to_visual(self._task.eval_docs[doc_id])
        return media[0] if len(media) == 1 and isinstance(media[0], Image.Image) else None

    def _image(self, doc_id: int) -> Image.Image:
        image: Image.Image = self._task.doc_to_visual(self._task.eval_docs[doc_id])[0]
        return image

    def _question(self, sample: Any) -> str:
        """As it was asked; of a stock task, with what the task writes around it."""
        if isinstance(sample["question"], str):
            return sample["question"]
        return str(self._task.doc_to_text(self._task.eval_docs[int(sample["doc_id"])]))

    def _sample(self, row: Row, doc_id: int) -> pd.Series:
        """A row's sample of a question; with several seeds, the first."""
        own = pick(self._frame[self._frame["doc_id"] == doc_id], row)
        found: pd.Series = own.iloc[0]
        return found

    @contextmanager
    def _asked(self, sample: Any, row: Row, image: Image.Image) -> Iterator[Any]:
        """A handle that has decided about the picture again: scores are not in any file."""
        keep = None if row["keep"] == "adaptive" else row["keep"]
        positions, seed = row["positions"], int(sample["seed"])
        compression = Compression(row["method"], keep, positions, seed, sample["options"])
        # what a method keeps can depend on every word that was asked
        asked = self._task.doc_to_messages(self._task.eval_docs[int(sample["doc_id"])])
        messages = ChatMessages(messages=asked).to_hf_messages()
        model, processor = self._loaded.model, self._loaded.processor
        text = processor.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        inputs = processor(images=[image], text=[text], return_tensors="pt")
        inputs = inputs.to(model.device, model.dtype)
        with quiet(), compression.patch(model) as handle:
            model.generate(**inputs, max_new_tokens=1, do_sample=False)
            yield handle


def rows_to_show(summary: Sequence[Row], task: str) -> list[Row]:
    """The full model, and every other method at one budget, under one policy each.

    The keep nearest to 11 %; of methods that skip work in layers, the one that leaves nearest to
    half of the visual tokens active.
    """
    rows = [row for row in summary if row["task"] == task]
    budgets = {row["keep"]: row["kept_fraction"] for row in rows if row["label"] == RANDOM}
    keep = min(budgets, key=lambda key: abs(budgets[key] - KEEP), default=None)
    found: dict[str, Row] = {}
    for label in dict.fromkeys(row["label"] for row in rows):
        own = [row for row in rows if row["label"] == label]
        if build(own[0]["method"], own[0]["options"]).site == "llm_rows":
            found[label] = min(own, key=lambda row: abs(row["active_fraction"] - ACTIVE))
            continue
        # what is kept does not depend on the position policy: the first one is shown
        shown = [r for r in own if r["method"] == FULL or r["keep"] in (keep, "adaptive")]
        if shown:
            found[label] = shown[0]
    return list(found.values())


def _titled(row: Row) -> str:
    return name(row) if row["keep"] == "adaptive" else f"{name(row)}, keep={row['keep']}"
