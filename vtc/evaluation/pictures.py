"""The same pictures under every method, side by side: what was kept, and what was answered."""

from __future__ import annotations

import base64
import io
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import pandas as pd
from PIL import Image

from vtc.evaluation.compression import FULL, RANDOM, Compression, build
from vtc.evaluation.evaluate import quiet
from vtc.evaluation.loading import Loaded
from vtc.evaluation.printed import name
from vtc.evaluation.table import Row, pick
from vtc.viz import as_seen, last_left, overlay

KEEP = 0.11
# of methods that skip work, the budget nearest to half of the layers
ACTIVE = 0.5


@dataclass(frozen=True)
class Shown:
    """One picture under one method: a data URI, and the answer as it was scored."""

    title: str
    image: str
    answer: str
    right: bool


@dataclass(frozen=True)
class Example:
    """A question about a picture, and what each method made of it."""

    question: str
    target: str
    kind: str
    shown: list[Shown]


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


def examples(
    frame: pd.DataFrame, summary: Sequence[Row], loaded: Loaded, task: Any, count: int
) -> list[Example]:
    """The first question of each of the first `count` kinds that have one picture.

    Under the full model and every method that drops tokens.
    """
    rows = [
        row
        for row in rows_to_show(summary, task.config.task)
        if row["method"] == FULL or row["kept_fraction"] < 1
    ]
    found: list[Example] = []
    for sample, doc, image in _firsts(frame, task, count):
        shown = [_show(frame, row, loaded, image, doc, sample["doc_id"]) for row in rows]
        question, kind = sample["question"] or "", sample["kind"] or ""
        found.append(Example(str(question), str(sample["target"]), str(kind), shown))
    return found


def layer_pictures(
    frame: pd.DataFrame, summary: Sequence[Row], loaded: Loaded, task: Any
) -> list[Shown]:
    """What decoder layers do with the first picture, under every method that changes it."""
    found: list[Shown] = []
    for sample, _, image in _firsts(frame, task, 1):
        seen = as_seen(image, loaded.processor)
        for row in rows_to_show(summary, task.config.task):
            own = _sample(frame, row, sample["doc_id"])
            with _asked(own, row, loaded, image) as handle:
                if handle.plans:
                    drawn = handle.plot(seen)
                    answer, right = str(own["answer"]).strip(), own["score"] >= 0.5
                    found.append(Shown(_titled(row), _data_uri(drawn, None), answer, right))
    return found


def _firsts(
    frame: pd.DataFrame, task: Any, count: int
) -> list[tuple[dict[Any, Any], Any, Image.Image]]:
    """Sample, question and picture: the first of each kind that has one picture, up to `count`."""
    title, docs = task.config.task, task.eval_docs
    full = frame[(frame["task"] == title) & (frame["label"] == FULL)]
    firsts = full.drop_duplicates("kind") if full["kind"].notna().any() else full
    found: list[tuple[dict[Any, Any], Any, Image.Image]] = []
    for sample in firsts.to_dict("records"):
        if len(found) == count:
            break
        doc = docs[int(sample["doc_id"])]
        media = task.doc_to_visual(doc)
        if len(media) == 1 and isinstance(media[0], Image.Image):
            found.append((sample, doc, media[0]))
    return found


def _titled(row: Row) -> str:
    return name(row) if row["keep"] == "adaptive" else f"{name(row)}, keep={row['keep']}"


def _sample(frame: pd.DataFrame, row: Row, doc_id: int) -> pd.Series:
    """A row's sample of a question; with several seeds, the first."""
    samples = pick(frame, row)
    first = samples["seed"] == samples["seed"].iloc[0]
    found: pd.Series = samples[(samples["doc_id"] == doc_id) & first].iloc[0]
    return found


def _show(
    frame: pd.DataFrame, row: Row, loaded: Loaded, image: Image.Image, doc: Any, doc_id: int
) -> Shown:
    sample = _sample(frame, row, doc_id)
    seen = as_seen(image, loaded.processor)
    scale = seen.width / image.width, seen.height / image.height
    boxes = [
        (x0 * scale[0], y0 * scale[1], x1 * scale[0], y1 * scale[1])
        for x0, y0, x1, y1 in doc.get("evidence") or []
    ]
    with _asked(sample, row, loaded, image) as handle:
        drawn = overlay(seen, last_left(handle.remaining), evidence=boxes)
    return Shown(name(row), _data_uri(drawn), str(sample["answer"]).strip(), sample["score"] >= 0.5)


@contextmanager
def _asked(sample: pd.Series, row: Row, loaded: Loaded, image: Image.Image) -> Iterator[Any]:
    """A handle that has decided about the picture again: cells hold answers, not decisions."""
    keep = None if row["keep"] == "adaptive" else row["keep"]
    positions, seed = row["positions"], int(sample["seed"])
    compression = Compression(row["method"], keep, positions, seed, sample["options"])
    messages = [
        {
            "role": "user",
            "content": [{"type": "image"}, {"type": "text", "text": str(sample["question"])}],
        }
    ]
    text = loaded.processor.apply_chat_template(
        messages, tokenize=False, add_generation_prompt=True
    )
    inputs = loaded.processor(images=[image], text=[text], return_tensors="pt")
    inputs = inputs.to(loaded.model.device, loaded.model.dtype)
    with quiet(), compression.patch(loaded.model) as handle:
        loaded.model.generate(**inputs, max_new_tokens=1, do_sample=False)
        yield handle


def _data_uri(image: Image.Image, width: int | None = 336) -> str:
    """A JPEG of this width; None: as wide as it is, for charts with letters."""
    shown = image.convert("RGB")
    if width is not None:
        shown = shown.resize((width, round(width * image.height / image.width)))
    buffer = io.BytesIO()
    shown.save(buffer, "JPEG", quality=86)
    return "data:image/jpeg;base64," + base64.b64encode(buffer.getvalue()).decode()
