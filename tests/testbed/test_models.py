"""The shipped models are what their code and training made, and they see."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from vtc.testbed import CLIP_KINDS, FAMILIES, KINDS, PAIR_KINDS, Example, examples, model_folder
from vtc.testbed.families import family
from vtc.testbed.scoring import gray


def load(name: str) -> tuple[Any, Any]:
    from transformers import AutoModelForImageTextToText, AutoProcessor

    folder = model_folder(name)
    model = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32)
    return model, AutoProcessor.from_pretrained(folder)


def kinds_of(name: str) -> list[str]:
    return [*KINDS] if name == "llava" else [*KINDS, *PAIR_KINDS, *CLIP_KINDS]


@torch.no_grad()
def right(model: Any, processor: Any, asked: Sequence[Example], blank: bool = False) -> float:
    """The share of right answers; questions with different pictures are not mixed in a batch."""
    hits = 0
    for kind in {example.kind for example in asked}:
        part = [example for example in asked if example.kind == kind]
        text, images, videos = [], [], []
        for example in part:
            shown = [gray() if blank else p for p in (example.video or example.images)]
            content = [{"type": "video"}] if example.video else [{"type": "image"}] * len(shown)
            (videos if example.video else images).append(shown)
            content = [*content, {"type": "text", "text": example.question}]
            message = {"role": "user", "content": content}
            text.append(processor.apply_chat_template([message], add_generation_prompt=True))
        given = {"videos": videos} if videos else {"images": images}
        inputs = processor(text=text, padding=True, return_tensors="pt", **given)
        out = model.generate(**inputs, max_new_tokens=4, do_sample=False)
        said = processor.batch_decode(
            out[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True
        )
        hits += sum(a == e.answer for a, e in zip(said, part, strict=True))
    return hits / len(asked)


@pytest.mark.parametrize("name", FAMILIES)
def test_the_shipped_model_sees(name: str) -> None:
    assert right(*load(name), examples(66, kinds=kinds_of(name))) >= 0.9


def test_the_shipped_model_cannot_guess() -> None:
    chance = sum(KINDS.values()) / len(KINDS)
    assert right(*load("llava"), examples(160), blank=True) <= chance + 0.03


def test_the_processor_shows_the_model_the_picture_as_drawn() -> None:
    from transformers import AutoProcessor

    from vtc.viz import as_seen

    image = examples(1)[0].image
    processor = AutoProcessor.from_pretrained(model_folder())
    assert as_seen(image, processor).tobytes() == image.tobytes()


@pytest.mark.parametrize("name", ["qwen2_vl", "internvl"])
@pytest.mark.parametrize("kind", ["color", "difference", "motion"])
def test_processors_hand_pixels_over_as_drawn(name: str, kind: str) -> None:
    from transformers import AutoProcessor

    processor = AutoProcessor.from_pretrained(model_folder(name))
    example = examples(1, kinds=[kind])[0]
    shown = [*(example.video or example.images)]
    content = [{"type": "video"}] if example.video else [{"type": "image"}] * len(shown)
    text = processor.apply_chat_template([{"role": "user", "content": content}])
    given = {"videos": [shown]} if example.video else {"images": shown}
    inputs = processor(text=[text], return_tensors="pt", **given)
    pixels = inputs.get("pixel_values_videos", inputs.get("pixel_values"))
    if name == "qwen2_vl":
        grid = inputs.get("video_grid_thw", inputs.get("image_grid_thw"))
        assert grid.tolist() == ([[2, 28, 28]] if example.video else [[1, 28, 28]] * len(shown))
        # [t, rows, columns, in row, in column, color, frame, y, x]
        cut = pixels.view(-1, 14, 14, 2, 2, 3, 2, 4, 4).permute(0, 6, 5, 1, 3, 7, 2, 4, 8)
        pixels = cut.reshape(-1, 3, 112, 112)
        pixels = pixels if example.video else pixels[::2]
    from vtc.testbed.training import OPENAI_CLIP_MEAN, OPENAI_CLIP_STD

    mean, std = (torch.tensor(v)[:, None, None] for v in (OPENAI_CLIP_MEAN, OPENAI_CLIP_STD))
    drawn = ((pixels * std + mean) * 255).round().to(torch.uint8)
    for image, found in zip(shown, drawn, strict=True):
        back = Image.fromarray(found.permute(1, 2, 0).contiguous().numpy())
        assert back.tobytes() == image.tobytes()


def test_qwen_takes_other_sizes_and_makes_no_picture_larger() -> None:
    from transformers import AutoProcessor

    processor = AutoProcessor.from_pretrained(model_folder("qwen2_vl"))
    sizes = [(112, 112), (80, 56), (40, 40), (224, 224)]
    images = [Image.new("RGB", size) for size in sizes]
    grids = processor.image_processor(images, return_tensors="pt")["image_grid_thw"]
    assert grids.tolist() == [[1, 28, 28], [1, 14, 20], [1, 10, 10], [1, 28, 28]]


@pytest.mark.parametrize("name", FAMILIES)
def test_the_shipped_tokenizer_and_processor_are_those_of_the_code(
    name: str, tmp_path: Path
) -> None:
    family(name).build_processor().save_pretrained(tmp_path)
    shipped = model_folder(name)
    for file in ("tokenizer.json", "chat_template.jinja"):
        assert (tmp_path / file).read_text() == (shipped / file).read_text()
    made, kept = (
        json.loads((folder / "processor_config.json").read_text()) for folder in (tmp_path, shipped)
    )
    assert made.keys() == kept.keys()
    for part in ("image_processor", "video_processor"):
        if part in made:
            assert made[part]["size"] == kept[part]["size"]


@pytest.mark.parametrize("name", FAMILIES)
def test_the_shipped_model_is_small_and_whole(name: str) -> None:
    from transformers import AutoModelForImageTextToText

    folder = model_folder(name)
    (weights,) = folder.glob("*.safetensors")
    assert weights.stat().st_size <= 16 * 2**20
    model, info = AutoModelForImageTextToText.from_pretrained(folder, output_loading_info=True)
    assert not any(info.values())
    assert model.dtype == torch.bfloat16
    assert sum(p.numel() for p in model.parameters()) <= (8e6 if name == "llava" else 7e6)
    built = family(name).build_model(family(name).tokenizer()).state_dict()
    assert {k: v.shape for k, v in built.items()} == {
        k: v.shape for k, v in model.state_dict().items()
    }
