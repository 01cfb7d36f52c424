"""Training of the testbed models: batches made on the device, several questions per picture.

One sequence holds a picture once and a slot for every kind of question behind it. A mask hides the
slots from each other and each starts at the same position, so every slot sees exactly what it
would see alone: the picture's tokens are paid for once and trained on nine times.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.image_utils import OPENAI_CLIP_MEAN, OPENAI_CLIP_STD

from vtc.testbed import questions as q
from vtc.testbed import scenes
from vtc.testbed.model import GRID, PATCH
from vtc.testbed.pictures import Pictures
from vtc.testbed.render import paint
from vtc.testbed.tokens import PAD_TARGET, QuestionTokens
from vtc.testbed.vocabulary import CAPTION, KIND_NAMES

IMAGE_TOKENS = GRID * GRID
# of the sum over labels, so that it starts near the size of the answer loss
LABEL_WEIGHT = 0.03
CAPTION_WEIGHT = 1.0
# values of one patch: color, shape, tens, ones, handwritten digit; 0 = none
PATCH_CLASSES = (9, 9, 11, 11, 11)
LABELS = 8 + 8 + 64 + 10 + 10 + 10


@dataclass
class Batch:
    """What one training step reads. N is the length of all slots, n of all targets."""

    images: Tensor  # uint8 [B, 3, S, S]
    ids: Tensor  # long [B, N], every slot in the order of ALL_KINDS
    at: Tensor  # long [B, n], output positions among the N
    targets: Tensor  # long [B, n]
    labels: Tensor  # float [B, LABELS], what the picture shows
    patches: Tensor  # long [B, 5, IMAGE_TOKENS], what each patch shows


def image_labels(scene: scenes.Scene) -> Tensor:
    """Which colors, shapes, pairs and digits are in the picture, float [B, LABELS]."""
    filled = scene.present[:, : scenes.OBJECTS, None]
    number = scene.present[:, scenes.NUMBER_PLACE, None]
    digit = scene.present[:, scenes.DIGIT_PLACE, None]
    parts = [
        (F.one_hot(scene.color, 8) * filled).amax(1),
        (F.one_hot(scene.shape, 8) * filled).amax(1),
        (F.one_hot(scene.color * 8 + scene.shape, 64) * filled).amax(1),
        F.one_hot(scene.number // 10, 10) * number,
        F.one_hot(scene.number % 10, 10) * number,
        F.one_hot(scene.digit, 10) * digit,
    ]
    return torch.cat(parts, 1).float()


def patch_values(scene: scenes.Scene, cover: Tensor) -> Tensor:
    """What each patch shows, if a place covers a fifth of it: long [B, 5, IMAGE_TOKENS]."""
    share, place = F.avg_pool2d(cover, PATCH).flatten(2).max(1)  # [B, T]
    none = torch.zeros_like(scene.number)[:, None]

    def value(objects: Tensor, number: Tensor, digit: Tensor) -> Tensor:
        table = torch.cat([objects, number[:, None], digit[:, None]], 1)  # [B, P]
        return table.gather(1, place) * (share > 0.2)

    nothing = none.expand(-1, scenes.OBJECTS)
    zero = none[:, 0]
    return torch.stack(
        [
            value(scene.color + 1, zero, zero),
            value(scene.shape + 1, zero, zero),
            value(nothing, scene.number // 10 + 1, zero),
            value(nothing, scene.number % 10 + 1, zero),
            value(nothing, zero, scene.digit + 1),
        ],
        1,
    )


def make_batch(
    size: int, tokens: QuestionTokens, pictures: Pictures, generator: torch.Generator
) -> Batch:
    """`size` new scenes, each with a question of every kind."""
    scene = scenes.sample(scenes.uniforms(size, generator))
    images, cover = paint(scene, pictures, generator)
    ids, at, targets, start = [], [], [], 0
    for kind in q.ALL_KINDS:
        if kind == CAPTION:
            colors, shapes, valid = q.caption(scene)
            slot = tokens.encode_caption(colors, shapes)
        else:
            slot = tokens.encode(kind, q.ask(scene, kind))
            valid = _answerable(scene, kind)
        ids.append(slot.ids)
        at.append(slot.at + start)
        targets.append(slot.targets.masked_fill(~valid[:, None], PAD_TARGET))
        start += tokens.length(kind)
    ids.append(ids[0].new_full((size, _padding(tokens)), tokens.pad))
    return Batch(
        images,
        torch.cat(ids, 1),
        torch.cat(at, 1),
        torch.cat(targets, 1),
        image_labels(scene),
        patch_values(scene, cover),
    )


def _padding(tokens: QuestionTokens) -> int:
    """Padding behind the slots: attention kernels want a length that is a multiple of 8."""
    slots = sum(tokens.length(kind) for kind in q.ALL_KINDS)
    return -(len(tokens.prefix) + IMAGE_TOKENS + slots) % 8


def _answerable(scene: scenes.Scene, kind: str) -> Tensor:
    places = {"number": scenes.NUMBER_PLACE, "digit": scenes.DIGIT_PLACE}
    return scene.present[:, places.get(kind, 0)]


def _packing(tokens: QuestionTokens) -> tuple[Tensor, Tensor]:
    """Who sees whom in the packed sequence `bool[S, S]`, and its position ids `[S]`."""
    shared = len(tokens.prefix) + IMAGE_TOKENS
    lengths = [*(tokens.length(kind) for kind in q.ALL_KINDS), _padding(tokens)]
    slot = torch.cat([torch.full((n,), i) for i, n in enumerate([shared, *lengths])])
    place = torch.cat([torch.arange(shared), *[shared + torch.arange(n) for n in lengths]])
    order = torch.arange(len(slot))
    seen = (slot[:, None] == slot) | (slot == 0)
    return seen & (order[:, None] >= order), place


def _answer_weights() -> Tensor:
    """The weight of every target `[n]`: each kind counts the same, whatever its tokens."""
    counts = [2] * len(KIND_NAMES) + [2 * scenes.OBJECTS]
    counts[KIND_NAMES.index("number")] = 3
    weights = [1.0] * len(KIND_NAMES) + [CAPTION_WEIGHT]
    widths = [3] * len(KIND_NAMES) + [3 * scenes.OBJECTS]
    each = [torch.full((w,), x / c) for w, x, c in zip(widths, weights, counts, strict=True)]
    return torch.cat(each) / sum(weights)


class PackedTrainer(nn.Module):
    """A stock LLaVA with heads that are thrown away, and the losses of one batch.

    `label_heads` read [CLS] at the end of the tower, as CLIP's loss does, and at the feature tap,
    so that its attention means something in the last blocks that the language model sees.
    `patch_head` reads single patches at the tap; its loss only speeds up the first steps.
    """

    # buffers: [1, 1, S, S], [1, S], [1, prefix], [3, 1, 1] twice, [n]
    mask: Tensor
    positions: Tensor
    prefix: Tensor
    mean: Tensor
    std: Tensor
    weight: Tensor

    def __init__(self, model: Any, tokens: QuestionTokens) -> None:
        """Adds the heads and the mask of the packed sequence to `model`."""
        super().__init__()
        self.model = model
        width = model.config.vision_config.hidden_size
        self.label_heads = nn.ModuleList([nn.Linear(width, LABELS) for _ in range(2)])
        self.patch_head = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, sum(PATCH_CLASSES)))
        mask, positions = _packing(tokens)
        constants = {
            "mask": mask[None, None],
            "positions": positions[None],
            "prefix": torch.tensor([tokens.prefix]),
            "mean": torch.tensor(OPENAI_CLIP_MEAN)[:, None, None],
            "std": torch.tensor(OPENAI_CLIP_STD)[:, None, None],
            "weight": _answer_weights(),
        }
        for name, value in constants.items():
            self.register_buffer(name, value, persistent=False)

    def tower(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Output of the block before the last, and of the last: [B, 1 + T, width] each."""
        tower = self.model.model.vision_tower
        tower = getattr(tower, "vision_model", tower)
        x = tower.pre_layrnorm(tower.embeddings((images.float() / 255 - self.mean) / self.std))
        tap = x
        for block in tower.encoder.layers:
            tap, x = x, block(x, None)
        return tap, tower.post_layernorm(x[:, 0])

    def logits(
        self, batch_ids: Tensor, at: Tensor, patches: Tensor, keep: Tensor | None = None
    ) -> Tensor:
        """Scores of the next token at every output position, [B, n, vocabulary].

        `keep` [B, T] hides the other image tokens from every row; positions stay as they are.
        """
        model = self.model.model
        embed = model.language_model.embed_tokens
        image = model.multi_modal_projector(patches)
        prefix = embed(self.prefix).expand(len(image), -1, -1)
        x = torch.cat([prefix.to(image.dtype), image, embed(batch_ids).to(image.dtype)], 1)
        mask = self.mask.expand(len(x), -1, -1, -1)
        if keep is not None:
            shown = F.pad(keep, (prefix.shape[1], batch_ids.shape[1]), value=True)
            mask = mask & shown[:, None, None]
        out = model.language_model(
            inputs_embeds=x,
            attention_mask=mask,
            position_ids=self.positions,
            use_cache=False,
        ).last_hidden_state
        at = at + prefix.shape[1] + image.shape[1]
        rows = out.gather(1, at[..., None].expand(-1, -1, out.shape[-1]))
        scores: Tensor = self.model.lm_head(rows)
        return scores

    def forward(self, batch: Batch, patch_weight: Tensor) -> dict[str, Tensor]:
        """Losses by name; `loss` is the one to minimize. `hit` [B, n] marks right tokens."""
        tap, pooled = self.tower(batch.images)
        logits = self.logits(batch.ids, batch.at, tap[:, 1:]).float()
        each = F.cross_entropy(
            logits.flatten(0, 1), batch.targets.flatten(), ignore_index=PAD_TARGET, reduction="none"
        ).view_as(batch.targets)
        answer = (each * self.weight).sum(-1).mean()
        labels = torch.stack(
            [
                F.binary_cross_entropy_with_logits(head(x).float(), batch.labels, reduction="none")
                for head, x in zip(self.label_heads, (tap[:, 0], pooled), strict=True)
            ]
        ).sum(-1)
        patch = self._patch_loss(tap[:, 1:], batch.patches)
        loss = answer + LABEL_WEIGHT * labels.mean() + patch_weight * patch
        hit = (logits.argmax(-1) == batch.targets) | (batch.targets == PAD_TARGET)
        return {
            "loss": loss,
            "answer": answer.detach(),
            "labels": labels.mean().detach(),
            "patch": patch.detach(),
            "hit": hit,
        }

    def _patch_loss(self, patches: Tensor, values: Tensor) -> Tensor:
        parts = self.patch_head(patches).float().split(PATCH_CLASSES, -1)
        total = values.new_zeros((), dtype=torch.float32)
        for i, scores in enumerate(parts):
            value = values[:, i]
            each = F.cross_entropy(scores.flatten(0, 1), value.flatten(), reduction="none")
            # most patches show nothing: count those for a tenth
            weight = torch.where(value.flatten() > 0, 1.0, 0.1)
            total = total + (each * weight).sum() / weight.sum()
        return total


def kind_hits(hit: Tensor, targets: Tensor) -> dict[str, tuple[int, int]]:
    """Right answers and answerable questions of every kind, from `hit` [B, n]."""
    result, start = {}, 0
    for kind in q.ALL_KINDS:
        width = 3 * scenes.OBJECTS if kind == CAPTION else 3
        asked = targets[:, start] != PAD_TARGET
        right = hit[:, start : start + width].all(-1) & asked
        result[kind] = (int(right.sum()), int(asked.sum()))
        start += width
    return result
