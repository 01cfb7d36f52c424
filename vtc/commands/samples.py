"""Prompts to look at with a model: pictures of a folder, an lmms-eval task, testbed scenes."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, overload

from PIL import Image

from vtc.commands.files import read_picture
from vtc.errors import InputError
from vtc.evaluation.evaluate import load_tasks, quiet, require_extra


@dataclass(frozen=True)
class Asked:
    """One question: a prompt, and what it shows as keyword arguments of a processor."""

    prompt: str
    shown: Mapping[str, Any]


class Samples(Sequence[Any]):
    """Processor outputs of questions, each made when it is looked at.

    Args:
        processor: of the model.
        questions: each makes its question.
        source: what they are, in words.
    """

    def __init__(
        self, processor: Any, questions: Sequence[Callable[[], Asked]], source: str
    ) -> None:
        self.source = source
        self._processor = processor
        self._questions = questions

    def __len__(self) -> int:
        return len(self._questions)

    @overload
    def __getitem__(self, index: int) -> Any: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[Any]: ...

    def __getitem__(self, index: int | slice) -> Any:
        if isinstance(index, slice):
            return Samples(self._processor, self._questions[index], self.source)
        asked = self._questions[index]()
        try:
            return self._processor(text=[asked.prompt], return_tensors="pt", **asked.shown)
        except ValueError as error:
            raise InputError(
                f"the model's processor refused question {index} ({error}), expected plain text "
                "about pictures: write it without special tokens"
            ) from None


def of_folder(processor: Any, folder: Path, question: str, count: int) -> Samples:
    """The same question about the first pictures of a folder, in the order of their names.

    Raises:
        InputError: no folder, no picture in it, or no question.
    """
    question = question.strip()
    if not question:
        raise InputError("the question is empty, expected some text: write --question '...'")
    if not folder.is_dir():
        raise InputError(f"images {str(folder)!r} is not a folder, expected one of pictures")
    endings = Image.registered_extensions()
    # hidden ones are nobody's pictures, such as files that are being written there
    shown = (p for p in folder.iterdir() if not p.name.startswith("."))
    paths = sorted(p for p in shown if p.suffix.lower() in endings and p.is_file())
    if not paths:
        raise InputError(
            f"folder {str(folder)!r} holds no picture, expected files such as .png or .jpg: name "
            "another folder"
        )
    asking = [partial(_about, processor, path, question) for path in paths[:count]]
    return Samples(processor, asking, f"{len(asking)} pictures of a folder, {question!r}")


def of_testbed(processor: Any, count: int) -> Samples:
    """Questions about scenes of the testbed's validation split: its tasks ask about others."""
    from vtc import testbed

    scenes = testbed.examples(count, split="validation")
    asking = [partial(_about, processor, scene.image, scene.question) for scene in scenes]
    return Samples(processor, asking, f"{len(asking)} validation scenes of the testbed")


def _about(processor: Any, picture: Image.Image | Path, question: str) -> Asked:
    image = read_picture(picture) if isinstance(picture, Path) else picture
    content = [{"type": "image"}, {"type": "text", "text": question}]
    chat = [{"role": "user", "content": content}]
    prompt = processor.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
    return Asked(prompt, {"images": [image]})


def of_task(processor: Any, task: str, include_path: Path | None, count: int) -> Samples:
    """The first questions of an lmms-eval task that show something.

    Raises:
        VtcError: the `eval` extra is not installed.
        OptionError, InputError: no such task, or none of its questions shows anything.
    """
    require_extra()
    from lmms_eval.protocol import ChatMessages

    from vtc.evaluation.visuals import for_processor, visuals_of

    asking: list[Callable[[], Asked]] = []
    with quiet():
        found = load_tasks([task], include_path)
    for docs, messages in ((part.eval_docs, part.doc_to_messages) for part in found):
        for i in range(len(docs)):
            if len(asking) == count:
                break
            chat = ChatMessages(messages=messages(docs[i]))
            visuals = visuals_of(chat)
            if not visuals.shown:
                continue
            prompt = processor.apply_chat_template(
                chat.to_hf_messages(), tokenize=False, add_generation_prompt=True
            )
            asking.append(partial(Asked, prompt, for_processor([visuals])))
    if not asking:
        raise InputError(f"no question of task {task!r} shows a picture, expected some that do")
    return Samples(processor, asking, f"{len(asking)} questions of {task}")
