"""`vtc demo`: a question answered with all visual tokens and with some, and a picture of these."""

from __future__ import annotations

import argparse
import json
from dataclasses import dataclass
from typing import Any

import torch
from PIL import Image

import vtc
from vtc import viz
from vtc.commands import models
from vtc.commands.files import picture_suffix, read_picture, replacing
from vtc.errors import InputError
from vtc.evaluation.compression import build, parse_method
from vtc.evaluation.loading import load
from vtc.methods.base import Method

KEEP = 0.11


@dataclass(frozen=True)
class Ask:
    """A question about a picture; what is known of a scene beside it."""

    source: str
    image: Image.Image
    question: str
    expected: str | None = None
    evidence: tuple[tuple[float, ...], ...] = ()


def run(args: argparse.Namespace) -> int:
    """Ask, print the answers and the report, write the overlay."""
    method = build(*parse_method(args.method))
    keep = _keep(method, args.keep)
    picture_suffix(args.out)
    device = models.device_of(args.device)
    models.quiet()
    with replacing(args.out) as temporary:
        ask = _ask(args)
        loaded = load(models.name_of(args.model), str(device))
        model, processor = loaded.model, loaded.processor
        inputs = _inputs(processor, ask).to(device, dtype=model.dtype)
        full = _answer(model, processor, inputs, args.max_new_tokens)
        torch.manual_seed(args.seed)
        with vtc.patch(model, method, keep, positions=args.positions, seed=args.seed) as handle:
            answer = _answer(model, processor, inputs, args.max_new_tokens)
            report = handle.report()
            _draw(ask, processor, handle).save(temporary)
    found = {
        "picture": ask.source,
        "question": ask.question,
        "expected": ask.expected,
        "full": full,
        "answer": answer,
        "method": method.name,
        "keep": keep,
        "overlay": str(args.out),
    }
    print(json.dumps(found | {"report": report.to_dict()}, indent=2) if args.json else _page(found))
    if not args.json:
        print(f"\n{report}")
    return 0


def _keep(method: Method, keep: float | int | None) -> float | int | None:
    if keep is None and method.count != "adaptive" and method.name != "none":
        keep = KEEP
    method.check_keep(keep)
    return keep


def _ask(args: argparse.Namespace) -> Ask:
    if args.question is not None and not args.question.strip():
        raise InputError("the question is empty, expected some text: write --question '...'")
    if args.image is not None:
        if args.question is None:
            raise InputError("--image came without a question, expected both: add --question '...'")
        return Ask(str(args.image), read_picture(args.image), args.question.strip())
    from vtc import testbed

    scene = testbed.examples(args.scene + 1, split="test", seed=0)[args.scene]
    source = f"scene {args.scene} of the testbed"
    if args.question is not None:
        return Ask(source, scene.image, args.question.strip())
    return Ask(source, scene.image, scene.question, scene.answer, tuple(scene.evidence))


def _inputs(processor: Any, ask: Ask) -> Any:
    content = [{"type": "image"}, {"type": "text", "text": ask.question}]
    chat = [{"role": "user", "content": content}]
    prompt = processor.apply_chat_template(chat, add_generation_prompt=True)
    try:
        return processor(images=ask.image, text=prompt, return_tensors="pt")
    except ValueError as error:
        raise InputError(
            f"the model's processor refused the question {ask.question!r} ({error}), expected "
            f"plain text about one picture: write it without special tokens"
        ) from None


def _answer(model: Any, processor: Any, inputs: Any, new_tokens: int) -> str:
    with torch.no_grad():
        out = model.generate(**inputs, max_new_tokens=new_tokens, do_sample=False)
    text: str = processor.decode(out[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    return text.strip()


def _draw(ask: Ask, processor: Any, handle: vtc.Handle) -> Image.Image:
    """What was decided about the picture as the model saw it."""
    seen = viz.as_seen(ask.image, processor)
    if not handle.remaining:
        return seen
    if handle.plans:
        return handle.plot(seen)
    # a processor that crops moves the picture under the boxes
    evidence = ask.evidence if seen.size == ask.image.size else ()
    return viz.overlay(seen, viz.last_left(handle.remaining), evidence=evidence)


def _page(found: dict[str, Any]) -> str:
    lines = [
        ("picture", found["picture"]),
        ("question", found["question"]),
        ("expected", found["expected"]),
        ("all tokens", found["full"]),
        (f"{found['method']} keep={found['keep']}", found["answer"]),
        ("overlay", found["overlay"]),
    ]
    shown = [(name, text) for name, text in lines if text is not None]
    width = max(len(name) for name, _ in shown)
    return "\n".join(f"{name.ljust(width)}  {text}" for name, text in shown)
