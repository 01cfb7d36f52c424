"""Packed training sees what the stock model sees; the shipped files are what it made."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from PIL import Image

from vtc.testbed import model_folder, pictures, scenes
from vtc.testbed.examples import _texts
from vtc.testbed.model import build_model, build_processor
from vtc.testbed.questions import ALL_KINDS, ask
from vtc.testbed.tokens import PAD_TARGET, QuestionTokens
from vtc.testbed.training import Batch, PackedTrainer, make_batch


@pytest.fixture(scope="module")
def processor() -> Any:
    from transformers import AutoProcessor

    return AutoProcessor.from_pretrained(model_folder())


@pytest.fixture(scope="module")
def packed(processor: Any) -> tuple[Any, PackedTrainer, scenes.Scene, Batch]:
    """A random model, its trainer, scenes and the batch made of them."""
    torch.manual_seed(0)
    model = build_model(processor.tokenizer, small=True).eval()
    tokens = QuestionTokens(processor.tokenizer)
    generator = torch.Generator().manual_seed(1)
    state = generator.get_state()
    batch = make_batch(3, tokens, pictures.load("train"), generator)
    scene = scenes.sample(scenes.uniforms(3, generator.set_state(state)))
    return model, PackedTrainer(model, tokens), scene, batch


def prompt(processor: Any, question: str) -> str:
    content = [{"type": "image"}, {"type": "text", "text": question}]
    text: str = processor.apply_chat_template(
        [{"role": "user", "content": content}], add_generation_prompt=True
    )
    return text


@torch.no_grad()
@pytest.mark.parametrize("kind", [k for k in ALL_KINDS if k != "caption"])
def test_a_packed_question_gets_the_logits_it_gets_alone(
    processor: Any, packed: Any, kind: str
) -> None:
    model, trainer, scene, batch = packed
    tap, _ = trainer.tower(batch.images)
    logits = trainer.logits(batch.ids, batch.at, tap[:, 1:])
    start = 3 * ALL_KINDS.index(kind)
    for b, (question, answer) in enumerate(_texts(kind, ask(scene, kind))):
        picture = Image.fromarray(batch.images[b].permute(1, 2, 0).numpy())
        text = prompt(processor, question) + answer
        inputs = processor(images=picture, text=text, return_tensors="pt")
        ids = processor.tokenizer(answer, add_special_tokens=False)["input_ids"]
        want = model(**inputs).logits[0, -len(ids) - 1 :]
        torch.testing.assert_close(logits[b, start : start + len(ids) + 1], want, atol=1e-5, rtol=0)
        targets = batch.targets[b, start : start + 3]
        if (targets != PAD_TARGET).any():  # the card may be missing from this scene
            wanted = [*ids, processor.tokenizer.eos_token_id]
            assert targets[: len(wanted)].tolist() == wanted


@torch.no_grad()
def test_hiding_tokens_equals_masking_them(processor: Any, packed: Any) -> None:
    _, trainer, _, batch = packed
    tap, _ = trainer.tower(batch.images)
    keep = torch.rand(3, 196, generator=torch.Generator().manual_seed(2)) < 0.3
    changed = tap[:, 1:].clone()
    changed[~keep] = 7.0
    args = (batch.ids, batch.at)
    torch.testing.assert_close(
        trainer.logits(*args, tap[:, 1:], keep), trainer.logits(*args, changed, keep)
    )


def test_training_learns_one_batch(processor: Any) -> None:
    torch.manual_seed(0)
    tokens = QuestionTokens(processor.tokenizer)
    trainer = PackedTrainer(build_model(processor.tokenizer, small=True), tokens)
    batch = make_batch(4, tokens, pictures.load("train"), torch.Generator().manual_seed(0))
    optimizer = torch.optim.AdamW(trainer.parameters(), lr=3e-3)
    losses = []
    for _ in range(30):
        found = trainer(batch, torch.tensor(0.3))
        optimizer.zero_grad()
        found["loss"].backward()
        optimizer.step()
        losses.append(float(found["answer"]))
    assert losses[-1] < losses[0] / 2


@torch.no_grad()
def test_the_shipped_model_sees_and_cannot_guess(processor: Any) -> None:
    from transformers import AutoModelForImageTextToText

    from vtc.testbed import KINDS, examples

    model = AutoModelForImageTextToText.from_pretrained(model_folder(), dtype=torch.float32)
    found = examples(160)
    text = [prompt(processor, example.question) for example in found]

    def right(images: list[Image.Image]) -> float:
        hits = 0
        for at in range(0, len(found), 40):
            part = slice(at, at + 40)
            inputs = processor(
                images=images[part], text=text[part], padding=True, return_tensors="pt"
            )
            out = model.generate(**inputs, max_new_tokens=8, do_sample=False)
            answers = processor.batch_decode(
                out[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True
            )
            hits += sum(a == e.answer for a, e in zip(answers, found[part], strict=True))
        return hits / len(found)

    assert right([example.image for example in found]) > 0.92
    chance = sum(KINDS.values()) / len(KINDS)
    assert right([Image.new("RGB", (112, 112), (127, 127, 127))] * len(found)) <= chance + 0.03


def test_the_processor_shows_the_model_the_picture_as_drawn(processor: Any) -> None:
    from vtc.testbed import examples
    from vtc.viz import as_seen

    image = examples(1)[0].image
    assert as_seen(image, processor).tobytes() == image.tobytes()


def test_the_shipped_tokenizer_and_processor_are_those_of_the_code(tmp_path: Any) -> None:
    build_processor().save_pretrained(tmp_path)
    for name in ("tokenizer.json", "chat_template.jinja"):
        assert (tmp_path / name).read_text() == (model_folder() / name).read_text()
    made, shipped = (
        json.loads((folder / "processor_config.json").read_text())
        for folder in (tmp_path, model_folder())
    )
    assert made["image_processor"]["size"] == shipped["image_processor"]["size"]
    assert made["patch_size"] == shipped["patch_size"] == 8


def test_the_shipped_model_is_small_and_whole() -> None:
    folder = model_folder()
    weights = list(folder.glob("*.safetensors"))
    assert weights and all(file.stat().st_size <= 16 * 2**20 for file in weights)
    config = json.loads((folder / "config.json").read_text())
    assert config["image_seq_length"] >= 144
