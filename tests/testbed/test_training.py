"""Packed training sees what the stock model sees; the shipped files are what it made."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from PIL import Image

from vtc.testbed import FAMILIES, model_folder, pictures, scenes
from vtc.testbed.batches import Batch, Part, kind_hits, make_batch, make_resized
from vtc.testbed.examples import _texts
from vtc.testbed.families import family
from vtc.testbed.packing import CLIP, PICTURE, SLOTS, targets_of
from vtc.testbed.questions import ask
from vtc.testbed.tokens import PAD_TARGET, QuestionTokens
from vtc.testbed.towers import TRAINERS
from vtc.testbed.training import PackedTrainer
from vtc.testbed.vocabulary import KIND_NAMES


@dataclass
class Packed:
    """A random model of a family, its trainer, and a batch of every form with its questions."""

    processor: Any
    model: Any
    module: Any
    tokens: QuestionTokens
    trainer: PackedTrainer
    batch: Batch


def make(name: str, size: int = 2) -> Packed:
    from transformers import AutoProcessor

    module, processor = family(name), AutoProcessor.from_pretrained(model_folder(name))
    torch.manual_seed(0)
    model = module.build_model(processor.tokenizer, small=True).eval()
    tokens = QuestionTokens(processor.tokenizer, "cpu", module.BEFORE, module.AFTER)
    sizes = dict.fromkeys((PICTURE,) if name == "llava" else SLOTS, size)
    trainer = TRAINERS[name](model, processor, tokens, sizes)
    batch = make_batch(sizes, tokens, pictures.load("train"), torch.Generator().manual_seed(1))
    return Packed(processor, model, module, tokens, trainer, batch)


@pytest.fixture(scope="module", params=FAMILIES)
def packed(request: pytest.FixtureRequest) -> Packed:
    return make(request.param)


def pil(images: torch.Tensor) -> list[Image.Image]:
    """uint8 [V, 3, h, w] as pictures."""
    return [Image.fromarray(image.permute(1, 2, 0).numpy()) for image in images]


def stock_logits(packed: Packed, shown: list[Image.Image], clip: bool, text: str) -> torch.Tensor:
    """Of the stock model, for the real processor's prompt: `text` is "question|answer"."""
    question, answer = text.split("|")
    content = [{"type": "video"}] if clip else [{"type": "image"}] * len(shown)
    prompt = packed.processor.apply_chat_template(
        [{"role": "user", "content": [*content, {"type": "text", "text": question}]}],
        add_generation_prompt=True,
    )
    given = {"videos": [shown]} if clip else {"images": shown}
    inputs = packed.processor(text=[prompt + answer], return_tensors="pt", **given)
    logits: torch.Tensor = packed.model(**inputs).logits[0]
    return logits


def slots(packed: Packed, form: str, part: Part, row: int) -> Iterator[tuple[int, int, str]]:
    """First target, number of targets and "question|answer" of the slots that have an answer."""
    decode, start, first = packed.processor.tokenizer.decode, 0, 0
    for kind in SLOTS[form]:
        length, most = packed.tokens.length(kind), targets_of(kind)
        ids = part.ids[row, start : start + length]
        targets = part.targets[row, first : first + most]
        count = int((targets != PAD_TARGET).sum())
        if count:
            asked = decode(ids[: part.at[row, first] - start + 1])
            asked = asked[len(packed.module.BEFORE) : -len(packed.module.AFTER)]
            yield first, count, f"{asked}|{decode(targets[: count - 1])}"
        start, first = start + length, first + most


@torch.no_grad()
def test_a_packed_question_gets_the_logits_it_gets_alone(packed: Packed) -> None:
    everything = packed.trainer.see(packed.batch.parts)
    for form, seen in everything.items():
        part, checked = packed.batch.parts[form], 0
        logits = packed.trainer.logits(form, part, seen.features)
        for row in range(len(part.ids)):
            for first, count, text in slots(packed, form, part, row):
                want = stock_logits(packed, pil(part.images[row]), form == CLIP, text)[-count:]
                found = logits[row, first : first + count]
                torch.testing.assert_close(found, want, atol=1e-5, rtol=0)
                checked += 1
        assert checked >= len(SLOTS[form])
    # LLaVA was trained on single pictures alone
    alone = packed.model.config.model_type == "llava"
    assert set(everything) == ({PICTURE} if alone else set(SLOTS))


@torch.no_grad()
@pytest.mark.parametrize("size", [(56, 56), (80, 112)])
def test_other_sizes_are_what_the_stock_model_sees(size: tuple[int, int]) -> None:
    packed = make("qwen2_vl", 1)
    form = packed.trainer.add_form(PICTURE, packed.processor, packed.tokens, size)
    generator = torch.Generator().manual_seed(4)
    part = make_resized(1, size, packed.tokens, pictures.load("train"), generator)
    logits = packed.trainer.logits(form, part, packed.trainer.see({form: part})[form].features)
    for first, count, text in slots(packed, PICTURE, part, 0):
        want = stock_logits(packed, pil(part.images[0]), False, text)[-count:]
        torch.testing.assert_close(logits[0, first : first + count], want, atol=1e-5, rtol=0)


def test_targets_are_the_answers(packed: Packed) -> None:
    """The first scene's questions in the words of `examples`."""
    generator = torch.Generator().manual_seed(1)
    scene = scenes.sample(scenes.uniforms(2, generator))
    texts = {text for *_, text in slots(packed, PICTURE, packed.batch.parts[PICTURE], 0)}
    for kind in KIND_NAMES[:6]:
        question, answer = next(iter(_texts(kind, ask(scene, kind))))
        assert f"{question}|{answer}" in texts


@torch.no_grad()
def test_hiding_tokens_equals_masking_them(packed: Packed) -> None:
    for form, part in packed.batch.parts.items():
        tokens = packed.trainer.see({form: part})[form].features.unflatten(0, (2, -1))
        keep = torch.rand(2, tokens.shape[1] * tokens.shape[2]) < 0.3
        changed = tokens.flatten(1, 2).clone()
        changed[~keep] = 7.0
        torch.testing.assert_close(
            packed.trainer.logits(form, part, tokens.flatten(0, 1), keep),
            packed.trainer.logits(form, part, changed.view_as(tokens).flatten(0, 1), keep),
        )


@torch.no_grad()
@pytest.mark.parametrize("name", ["llava", "internvl"])
def test_cls_scores_are_the_stock_attention(name: str) -> None:
    packed = make(name)
    grids = packed.trainer.grids(packed.batch.parts[PICTURE].images)
    scores = packed.trainer.cls_scores(grids)
    packed.model.set_attn_implementation("eager")
    tower = packed.model.model.vision_tower
    maps = tower(grids, output_attentions=True).attentions
    # the last third of the blocks that the language model sees
    used = maps[1:2]
    want = torch.stack([a[:, :, 0, 1:].mean(1) for a in used]).sum(0)
    if name == "internvl":
        side = packed.model.model.pixel_shuffle(want.view(-1, 28, 28, 1), 0.5)
        want = side.flatten(1, 2).mean(-1)
    torch.testing.assert_close(scores, want)


@pytest.mark.parametrize(
    "name", ["llava", *(pytest.param(n, marks=pytest.mark.slow) for n in ("qwen2_vl", "internvl"))]
)
def test_training_learns_one_batch(name: str) -> None:
    packed = make(name)
    optimizer = torch.optim.AdamW(packed.trainer.parameters(), lr=3e-3)
    weights, losses = dict.fromkeys(packed.batch.parts, 1.0), []
    for _ in range(25):
        found, hits = packed.trainer(packed.batch, torch.tensor(0.3), weights)
        optimizer.zero_grad()
        found["loss"].backward()
        optimizer.step()
        losses.append([float(found[form]) for form in packed.batch.parts])
    assert all(last < first / 2 for first, last in zip(losses[0], losses[-1], strict=True))
    for form, hit in hits.items():
        counted = kind_hits(form, hit, packed.batch.parts[form].targets)
        assert set(counted) == set(SLOTS[form])
        assert all(right <= asked <= 8 for right, asked in counted.values())
