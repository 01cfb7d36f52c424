"""Asks a trained model of the testbed with all its tokens, and with gray pictures.

    python benchmarks/evaluate_testbed.py --family qwen2_vl --out results/testbed_full_qwen2_vl.json

Plain `generate` of the stock classes, nothing of vtc's runtime. `--wait` lets it draw the questions
while the training that writes the model still runs.
"""

from __future__ import annotations

import argparse
import datetime
import json
import platform
import subprocess
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import transformers
from PIL import Image

from vtc.testbed import examples
from vtc.testbed.examples import Example
from vtc.testbed.families import FAMILIES
from vtc.testbed.model import model_folder
from vtc.testbed.scoring import caption, gray, one_word
from vtc.testbed.vocabulary import CAPTION, CLIP_KINDS, KINDS, PAIR_KINDS

BATCH = {1: 200, 2: 100, 4: 50}


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--family", choices=FAMILIES, required=True)
    parser.add_argument("--model", type=Path, help="default: the model that comes with vtc")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--questions", type=int, default=2000, help="about single pictures")
    parser.add_argument("--stories", type=int, default=500, help="of each kind about several")
    parser.add_argument("--captions", type=int, default=250)
    parser.add_argument("--commit", default=commit(), help="of the code, where git is not there")
    parser.add_argument("--wait", action="store_true", help="until the model's file is there")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    return parser.parse_args()


def commit() -> str | None:
    """The commit of this checkout."""
    command = ["git", "-C", str(Path(__file__).parent), "rev-parse", "--short", "HEAD"]
    found = subprocess.run(command, capture_output=True, text=True, check=False)
    return found.stdout.strip() or None


def questions(args: argparse.Namespace) -> dict[str, list[Example]]:
    """All questions, by what they are about."""
    asked = {
        "scenes": examples(args.questions),
        "captions": examples(args.captions, kinds=[CAPTION]),
    }
    if args.family != "llava":
        asked["pairs"] = examples(args.stories * len(PAIR_KINDS), kinds=[*PAIR_KINDS])
        asked["clips"] = examples(args.stories * len(CLIP_KINDS), kinds=[*CLIP_KINDS])
    return {name: found for name, found in asked.items() if found}


@torch.no_grad()
def answers(model: Any, processor: Any, asked: Sequence[Example], blank: bool) -> list[str]:
    """What the model says, greedily."""
    said: list[str] = []
    size = BATCH[len(asked[0].boxes)]
    for at in range(0, len(asked), size):
        part = asked[at : at + size]
        inputs = processor(**prompts(processor, part, blank), padding=True, return_tensors="pt")
        inputs = inputs.to(model.device, model.dtype)
        out = model.generate(**inputs, max_new_tokens=32, do_sample=False)
        new = out[:, inputs["input_ids"].shape[1] :]
        said += processor.batch_decode(new, skip_special_tokens=True)
    return said


def prompts(processor: Any, asked: Sequence[Example], blank: bool) -> dict[str, Any]:
    """Texts and pictures for the processor, gray ones where nothing is to be seen."""
    text = []
    for example in asked:
        content = [{"type": "image"} for _ in example.images]
        content += [{"type": "video"}] if example.video else []
        message = {
            "role": "user",
            "content": [*content, {"type": "text", "text": example.question}],
        }
        text.append(processor.apply_chat_template([message], add_generation_prompt=True))

    def shown(pictures: Sequence[Image.Image]) -> list[Image.Image]:
        return [gray() if blank else picture for picture in pictures]

    if asked[0].video:
        return {"text": text, "videos": [shown(example.video or ()) for example in asked]}
    return {"text": text, "images": [p for example in asked for p in shown(example.images)]}


def score(asked: Sequence[Example], said: Sequence[str]) -> dict[str, float]:
    """Per cent right by kind, and `all`, the mean over questions."""
    found: dict[str, list[float]] = {}
    for example, text in zip(asked, said, strict=True):
        doc = {"answer": example.answer, "kind": example.kind}
        if example.kind == CAPTION:
            values = {f"caption_{name}": value for name, value in caption(doc, [text]).items()}
        else:
            right = one_word(doc, [text])["accuracy"]
            values = {example.kind: right, "all": right}
        for name, value in values.items():
            found.setdefault(name, []).append(value)
    return {name: round(100 * sum(v) / len(v), 2) for name, v in found.items()}


def main() -> None:
    """Draws the questions, waits for the model if asked to, and writes one file."""
    args = arguments()
    asked = questions(args)
    folder = args.model or model_folder(args.family)
    while args.wait and not (folder / "model.safetensors").is_file():
        time.sleep(1)
    if args.wait:  # the file may not be whole yet
        time.sleep(3)
    model = transformers.AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32)
    model = model.to(args.device).eval()
    processor = transformers.AutoProcessor.from_pretrained(model_folder(args.family))
    cuda = args.device.startswith("cuda")
    result: dict[str, Any] = {
        "family": args.family,
        "parameters": sum(p.numel() for p in model.parameters()),
        "questions": {name: len(found) for name, found in asked.items()},
        "chance": {k: round(100 * v, 1) for k, v in {**KINDS, **PAIR_KINDS, **CLIP_KINDS}.items()},
    }
    for how in ("full", "blank"):
        result[how] = {
            name: score(found, answers(model, processor, found, how == "blank"))
            for name, found in asked.items()
        }
        print(how, json.dumps(result[how]), flush=True)
    result |= {
        "machine": torch.cuda.get_device_name() if cuda else platform.processor() or "cpu",
        "dtype": "float32",
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "commit": args.commit,
        "date": datetime.date.today().isoformat(),
    }
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
