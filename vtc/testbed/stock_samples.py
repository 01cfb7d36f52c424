"""Small data sets in the schemas of public benchmarks, so that their stock task code can be run.

The pictures are the testbed's scenes and the questions are in its words, which its models know; the
columns, their types, file names and the rules of an answer are the benchmark's. What is measured on
them says that prompts, scoring and aggregation work, and nothing about the benchmark itself.
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from vtc.errors import OptionError
from vtc.testbed import scenes
from vtc.testbed.parquet import parquet_bytes
from vtc.testbed.stock_scenes import Scenes, absent, asked, is_there, relations

Row = dict[str, Any]

# the stock prompts end with an instruction in words that the models never saw and read letter by
# letter: behind it they are wrong more often than not
PROMPTS = {"pre_prompt": "", "post_prompt": ""}
# annotators who agree, of ten; where only two do, even the right answer gets a part of a point
_AGREED = (10, 10, 9, 2)


def write_stock_samples(folder: str | Path, questions: int = 240) -> list[str]:
    """Write `folder/<task>/...parquet` as `hf download` leaves a data set, for `vtc tasks --data`.

    Args:
        folder: made if needed.
        questions: of each benchmark; a longer data set starts with the shorter one.

    Returns:
        The tasks' names: pope, textvqa_val, gqa, mme, chartqa and docvqa_val.

    Raises:
        OptionError: an odd number of questions, or none: MME's come in pairs.
        VtcError: the `eval` extra is not installed.
    """
    require_pairs(questions)
    drawn = Scenes()
    for name, (file, rows) in _DATA_SETS.items():
        _write(Path(folder) / name / file, list(itertools.islice(rows(drawn), questions)))
    _write(Path(folder) / "gqa" / _GQA_PICTURES, _gqa_pictures(drawn, questions // 2))
    return list(_DATA_SETS)


def require_pairs(questions: int) -> None:
    """Raises `OptionError` for an odd number of questions, or none."""
    if questions < 2 or questions % 2:
        raise OptionError(f"questions={questions}: expected an even number, MME's come in pairs")


def _pope(found: Scenes) -> Iterator[Row]:
    """Yes and no in turn, with POPE's three kinds of objects that are not there.

    Random: neither color nor shape is in the picture; popular: the shape is; adversarial: both are,
    on different objects.
    """
    number = itertools.count()
    for drawn in found:
        missing = absent(drawn.objects)
        if not all(missing.values()):
            continue
        choose = random.Random(drawn.index)
        for turn, (category, candidates) in enumerate(missing.items()):
            there = drawn.objects[turn % len(drawn.objects)]
            for answer, what in (("yes", there), ("no", choose.choice(candidates))):
                i = next(number)
                yield {
                    "id": str(i),
                    "question_id": str(i + 1),
                    "question": is_there(what, turn),
                    "answer": answer,
                    "image_source": f"scene_{drawn.index:06}",
                    "image": drawn.image,
                    "category": category,
                }


def _mme(found: Scenes) -> Iterator[Row]:
    """Pairs of a yes and a no about one picture, in three of MME's categories of perception."""
    for drawn in found:
        category = ("existence", "color", "position")[drawn.index % 3]
        one = drawn.objects[drawn.index % len(drawn.objects)]
        missing = absent(drawn.objects)
        candidates = missing["random"]
        if category == "color":
            # as in "Is there a red coat?" and "Is there a yellow coat?"
            candidates = [(c, s) for c, s in missing["popular"] if s == one[1]]
        other = random.Random(drawn.index).choice(candidates)
        texts = [is_there(what, drawn.index) for what in (one, other)]
        if category == "position":
            texts = [*relations(drawn)]
        for question, answer in zip(texts, ("Yes", "No"), strict=True):
            yield {
                "question_id": f"{category}/{drawn.index:06}.png",
                "image": drawn.image,
                "question": question,
                "answer": answer,
                "category": category,
            }


def _textvqa(found: Scenes) -> Iterator[Row]:
    """The number on the card, with ten annotators who do not always agree."""
    for drawn in found:
        question, answer = asked(drawn, "number")
        agreed = _AGREED[drawn.index % len(_AGREED)]
        misread = str((int(answer) - 10 + 37) % 90 + 10)
        yield {
            "image_id": f"scene_{drawn.index:06}",
            "question_id": 34602 + drawn.index,
            "question": question,
            "image": drawn.image,
            "image_width": scenes.SIZE,
            "image_height": scenes.SIZE,
            "answers": [answer] * agreed + [misread] * (10 - agreed),
            "ocr_tokens": [answer],
            "set_name": "val",
        }


def _gqa(found: Scenes) -> Iterator[Row]:
    """A color and a place in each picture; the pictures are a data set of their own."""
    for drawn in found:
        for i, kind in enumerate(("color", "where")):
            question, answer = asked(drawn, kind)
            yield {
                "id": f"{2 * drawn.index + i:08}",
                "imageId": f"n{drawn.index:06}",
                "question": question,
                "answer": answer,
                "fullAnswer": f"{answer}.",
                "isBalanced": True,
            }


def _gqa_pictures(found: Scenes, count: int) -> list[Row]:
    """Not in the order of the questions: they are joined by name."""
    first = list(itertools.islice(found, count))
    return [{"id": f"n{drawn.index:06}", "image": drawn.image} for drawn in reversed(first)]


def _chartqa(found: Scenes) -> Iterator[Row]:
    """How many there are; no other number so small is within the 5 % that are free."""
    for drawn in found:
        question, answer = asked(drawn, "count")
        kind = ("human_test", "augmented_test")[drawn.index % 2]
        yield {"type": kind, "question": question, "answer": answer, "image": drawn.image}


def _docvqa(found: Scenes) -> Iterator[Row]:
    """The number on the card; one digit right of two is half a point."""
    for drawn in found:
        question, answer = asked(drawn, "number")
        yield {
            "questionId": str(drawn.index),
            "question": question,
            "image": drawn.image,
            "docId": drawn.index,
            "answers": [answer],
            "data_split": "val",
        }


_DATA_SETS: dict[str, tuple[str, Callable[[Scenes], Iterator[Row]]]] = {
    "pope": ("data/test-00000-of-00001.parquet", _pope),
    "textvqa_val": ("data/validation-00000-of-00001.parquet", _textvqa),
    "gqa": ("testdev_balanced_instructions/testdev-00000-of-00001.parquet", _gqa),
    "mme": ("data/test-00000-of-00001.parquet", _mme),
    "chartqa": ("data/test-00000-of-00001.parquet", _chartqa),
    "docvqa_val": ("DocVQA/validation-00000-of-00001.parquet", _docvqa),
}
_GQA_PICTURES = "testdev_balanced_images/testdev-00000-of-00001.parquet"


def _write(path: Path, rows: Sequence[Row]) -> None:
    """A parquet file whose schema says which column is a picture."""
    columns = {name: [row[name] for row in rows] for name in rows[0]}

    def features(datasets: Any) -> Row:
        plain = {name: values for name, values in columns.items() if name != "image"}
        found = datasets.Dataset.from_dict(plain).features | {"image": datasets.Image()}
        return {name: found[name] for name in columns}

    content = parquet_bytes(columns, features)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
