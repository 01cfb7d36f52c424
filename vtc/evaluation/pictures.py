"""The same pictures under every method, side by side: what was kept, and what was answered."""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import pandas as pd
from PIL import Image

from vtc.evaluation.compression import Compression
from vtc.evaluation.evaluate import quiet
from vtc.evaluation.loading import Loaded
from vtc.evaluation.printed import name
from vtc.evaluation.table import FULL, RANDOM, Row, pick
from vtc.types import Selection

KEEP = 0.11


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
    """The full model, and every other method at the keep nearest to 11 %, under one policy each."""
    rows = [row for row in summary if row["task"] == task]
    budgets = {row["keep"]: row["kept_fraction"] for row in rows if row["label"] == RANDOM}
    keep = min(budgets, key=lambda key: abs(budgets[key] - KEEP), default=None)
    found: dict[str, Row] = {}
    for row in rows:
        if row["method"] == FULL or row["keep"] in (keep, "adaptive"):
            # what is kept does not depend on the position policy: the first one is shown
            found.setdefault(row["label"], row)
    return list(found.values())


def examples(
    frame: pd.DataFrame, summary: Sequence[Row], loaded: Loaded, task: Any, count: int
) -> list[Example]:
    """The first question of each of the first `count` kinds that have one picture."""
    title = task.config.task
    rows = rows_to_show(summary, title)
    docs = task.eval_docs
    full = frame[(frame["task"] == title) & (frame["label"] == FULL)]
    firsts = full.drop_duplicates("kind") if full["kind"].notna().any() else full
    found: list[Example] = []
    for sample in firsts.to_dict("records"):
        if len(found) == count:
            break
        doc = docs[int(sample["doc_id"])]
        media = task.doc_to_visual(doc)
        if len(media) == 1 and isinstance(media[0], Image.Image):
            shown = [_show(frame, row, loaded, media[0], doc, sample["doc_id"]) for row in rows]
            question, kind = sample["question"] or "", sample["kind"] or ""
            found.append(Example(str(question), str(sample["target"]), str(kind), shown))
    return found


def _show(
    frame: pd.DataFrame, row: Row, loaded: Loaded, image: Image.Image, doc: Any, doc_id: int
) -> Shown:
    from vtc.viz import as_seen, overlay

    samples = pick(frame, row)
    # with several seeds, the first
    sample = samples[
        (samples["doc_id"] == doc_id) & (samples["seed"] == samples["seed"].iloc[0])
    ].iloc[0]
    seen = as_seen(image, loaded.processor)
    scale = seen.width / image.width, seen.height / image.height
    boxes = [
        (x0 * scale[0], y0 * scale[1], x1 * scale[0], y1 * scale[1])
        for x0, y0, x1, y1 in doc.get("evidence") or []
    ]
    selection = _selection(sample, row, loaded, image)
    drawn = overlay(seen, selection, evidence=boxes)
    return Shown(name(row), _data_uri(drawn), str(sample["answer"]).strip(), sample["score"] >= 0.5)


def _selection(sample: pd.Series, row: Row, loaded: Loaded, image: Image.Image) -> Selection:
    """What the method keeps of the picture, decided again: cells hold answers, not selections."""
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
    from vtc.viz import last_left

    with quiet(), compression.patch(loaded.model) as handle:
        loaded.model.generate(**inputs, max_new_tokens=1, do_sample=False)
        selection: Selection = last_left(handle.token_selections)
    return selection


def _data_uri(image: Image.Image) -> str:
    buffer = io.BytesIO()
    image.convert("RGB").resize((336, round(336 * image.height / image.width))).save(
        buffer, "JPEG", quality=86
    )
    return "data:image/jpeg;base64," + base64.b64encode(buffer.getvalue()).decode()
