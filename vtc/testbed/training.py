"""The losses of one training batch, over a stock model of any family."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.image_utils import OPENAI_CLIP_MEAN, OPENAI_CLIP_STD

from vtc.testbed.batches import CELL_CLASSES, LABELS, Batch, Part
from vtc.testbed.packing import PICTURE, SLOTS, Packing, Prompt, read_prompt
from vtc.testbed.scenes import SIZE
from vtc.testbed.tokens import PAD_TARGET, QuestionTokens

# of the sum over labels, so that it starts near the size of the answer loss
LABEL_WEIGHT = 0.03


@dataclass
class Seen:
    """What a tower makes of G grids: pictures, frames, or what it takes two frames for."""

    features: Tensor  # [G, T, F], a row per token of the language model
    classes: list[Tensor]  # [G, width] each: [CLS] where its attention is to mean something


class PackedTrainer(nn.Module, ABC):
    """A stock model with heads that are thrown away, and the losses of one batch.

    `label_heads` read [CLS], as CLIP's loss does, so that its attention means something in the
    blocks that the language model sees. `patch_head` reads single tokens as the language model gets
    them; its loss only speeds up the first steps.
    """

    # buffers: [3, 1, 1] each
    mean: Tensor
    std: Tensor

    def __init__(self, model: Any, processor: Any, tokens: QuestionTokens, forms: Iterable[str]):
        """Adds the heads to `model`, and a packing for each of `forms`, see packing.py."""
        super().__init__()
        self.model = model
        width, classes = self.widths()
        hidden = model.config.text_config.hidden_size
        self.label_heads = nn.ModuleList(
            [nn.Sequential(nn.LayerNorm(width), nn.Linear(width, LABELS)) for _ in range(classes)]
        )
        self.patch_head = nn.Sequential(nn.LayerNorm(hidden), nn.Linear(hidden, sum(CELL_CLASSES)))
        self.packings = nn.ModuleDict()
        for form in forms:
            self.add_form(form, processor, tokens)
        for name, value in (("mean", OPENAI_CLIP_MEAN), ("std", OPENAI_CLIP_STD)):
            self.register_buffer(name, torch.tensor(value)[:, None, None], persistent=False)

    def add_form(
        self, form: str, processor: Any, tokens: QuestionTokens, size: tuple[int, int] | None = None
    ) -> str:
        """A packing for pictures of `size` (height, width); returns its name."""
        prompt = read_prompt(processor, tokens, form, size or (SIZE, SIZE))
        name = form if size is None else resized(size)
        self.packings[name] = Packing(prompt, self.places(prompt), SLOTS[form], tokens)
        return name

    @abstractmethod
    def widths(self) -> tuple[int, int]:
        """Width of [CLS], and how often it is read."""

    @abstractmethod
    def grids(self, images: Tensor) -> Tensor:
        """What the tower sees of pictures uint8 [B, V, 3, h, w], with B·G rows: [B·G, …]."""

    @abstractmethod
    def tower(self, grids: Tensor) -> Seen:
        """The features of a batch of grids, by the stock modules."""

    @abstractmethod
    def project(self, features: Tensor) -> Tensor:
        """Features [G, T, F] as tokens of the language model [G, T, D]."""

    @abstractmethod
    def blocks(self) -> list[nn.Module]:
        """Blocks of the tower, to be compiled one by one."""

    def cls_scores(self, grids: Tensor) -> Tensor | None:
        """Attention of [CLS] to tokens over the last blocks, [G, T]; None without a [CLS]."""
        return None

    def places(self, prompt: Prompt) -> Tensor:
        """Position ids of the prompt, [A, P]."""
        return torch.arange(len(prompt.ids))[None]

    def normal(self, images: Tensor) -> Tensor:
        """Pixels as the processors hand them over."""
        normal: Tensor = (images.float() / 255 - self.mean) / self.std
        return normal

    def see(self, parts: Mapping[str, Part]) -> dict[str, Seen]:
        """One pass through the tower over all pictures, which have one size."""
        grids = [self.grids(part.images) for part in parts.values()]
        seen, counts = self.tower(torch.cat(grids)), [len(grid) for grid in grids]
        features = seen.features.split(counts)
        classes = [value.split(counts) for value in seen.classes]
        return {
            form: Seen(features[i], [value[i] for value in classes]) for i, form in enumerate(parts)
        }

    def logits(self, form: str, part: Part, features: Tensor, keep: Tensor | None = None) -> Tensor:
        """Scores of the next token at every output position, [B, n, vocabulary].

        `keep` [B, T] hides the other visual tokens from every row; positions stay as they are.
        """
        packing: Any = self.packings[form]
        language = self.model.model.language_model
        tokens = self.project(features).unflatten(0, (len(part.ids), -1)).flatten(1, 2)
        x = packing.embed(language.embed_tokens, tokens, part.ids)
        mask = packing.mask.expand(len(x), -1, -1, -1) if keep is None else packing.hidden(keep)
        out = language(
            inputs_embeds=x, attention_mask=mask, position_ids=packing.positions, use_cache=False
        ).last_hidden_state
        at = part.at + packing.shared
        rows = out.gather(1, at[..., None].expand(-1, -1, out.shape[-1]))
        scores: Tensor = self.model.lm_head(rows)
        return scores

    def answer_loss(self, form: str, part: Part, features: Tensor) -> tuple[Tensor, Tensor]:
        """Cross-entropy of the answers, and which targets [B, n] are right."""
        logits = self.logits(form, part, features).float()
        each = F.cross_entropy(
            logits.flatten(0, 1), part.targets.flatten(), ignore_index=PAD_TARGET, reduction="none"
        ).view_as(part.targets)
        packing: Any = self.packings[form]
        loss = (each * packing.weight).sum(-1).mean()
        return loss, (logits.argmax(-1) == part.targets) | (part.targets == PAD_TARGET)

    def forward(
        self, batch: Batch, patch_weight: Tensor, weights: Mapping[str, float]
    ) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Losses by name, `loss` the one to minimize; and the right targets of every form.

        `weights` is what the answers of each form count.
        """
        seen = self.see(batch.parts)
        hits, answer, losses = {}, batch.labels.new_zeros(()), {}
        for form, part in batch.parts.items():
            found, hits[form] = self.answer_loss(form, part, seen[form].features)
            answer = answer + weights[form] * found
            losses[form] = found.detach()
        labels = self._label_loss(seen[PICTURE].classes, batch.labels)
        patch = self._patch_loss(seen[PICTURE].features, batch.patches)
        losses |= {"labels": labels.detach(), "patch": patch.detach()}
        losses["loss"] = answer + LABEL_WEIGHT * labels + patch_weight * patch
        return losses, hits

    def _label_loss(self, classes: list[Tensor], labels: Tensor) -> Tensor:
        each = [
            F.binary_cross_entropy_with_logits(head(x).float(), labels, reduction="none")
            for head, x in zip(self.label_heads, classes, strict=True)
        ]
        return torch.stack(each).sum(-1).mean() if each else labels.new_zeros(())

    def _patch_loss(self, features: Tensor, values: Tensor) -> Tensor:
        parts = self.patch_head(self.project(features)).float().split(CELL_CLASSES, -1)
        total = values.new_zeros((), dtype=torch.float32)
        for i, scores in enumerate(parts):
            value = values[:, i].flatten()
            each = F.cross_entropy(scores.flatten(0, 1), value, reduction="none")
            # most cells show nothing: count those for a tenth
            weight = torch.where(value > 0, 1.0, 0.1)
            total = total + (each * weight).sum() / weight.sum()
        return total


def resized(size: tuple[int, int]) -> str:
    """The name of the form of single pictures of another size (height, width)."""
    return f"{PICTURE}_{size[0]}x{size[1]}"
