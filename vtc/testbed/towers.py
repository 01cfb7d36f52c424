"""The towers of the families on batches of pictures of one size, by their stock modules.

They equal the stock `forward`; what differs is that a batch of grids stays a batch where Qwen2-VL
packs it into one long row, and that nothing is read off hooks.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vtc import ops
from vtc.testbed.batches import IMAGE_TOKENS
from vtc.testbed.changes import FRAMES
from vtc.testbed.packing import Prompt
from vtc.testbed.training import PackedTrainer, Seen


class LlavaTrainer(PackedTrainer):
    """CLIP: the language model reads the block before the last, [CLS] is read at both."""

    def widths(self) -> tuple[int, int]:
        """At both blocks."""
        return self.model.config.vision_config.hidden_size, 2

    def grids(self, images: Tensor) -> Tensor:
        """Every picture is a grid."""
        return self.normal(images).flatten(0, 1)

    def _tower(self) -> Any:
        tower = self.model.model.vision_tower
        return getattr(tower, "vision_model", tower)

    def blocks(self) -> list[nn.Module]:
        """The stock blocks."""
        return [*self._tower().encoder.layers]

    def tower(self, grids: Tensor) -> Seen:
        """As CLIP's vision model, up to the block before the last for the features."""
        tower = self._tower()
        x = tower.pre_layrnorm(tower.embeddings(grids))
        tap = x
        for block in tower.encoder.layers:
            tap, x = x, block(x, None)
        return Seen(tap[:, 1:], [tap[:, 0], tower.post_layernorm(x[:, 0])])

    def project(self, features: Tensor) -> Tensor:
        """The stock projector."""
        tokens: Tensor = self.model.model.multi_modal_projector(features)
        return tokens

    def cls_scores(self, grids: Tensor) -> Tensor:
        """Over the last third of the blocks up to the features."""
        tower = self._tower()
        x, blocks = tower.pre_layrnorm(tower.embeddings(grids)), tower.encoder.layers[:-1]
        score: Tensor = x.new_zeros(len(x), IMAGE_TOKENS)
        for i, block in enumerate(blocks):
            if i >= _first_scored(blocks):
                score = score + _cls_row(block.self_attn, block.layer_norm1(x))
            x = block(x, None)
        return score


class InternVLTrainer(PackedTrainer):
    """The language model reads the last block; four patches make a token by pixel shuffle."""

    def widths(self) -> tuple[int, int]:
        """Behind two blocks."""
        return self.model.config.vision_config.hidden_size, 2

    def grids(self, images: Tensor) -> Tensor:
        """Every picture and every frame is a grid."""
        return self.normal(images).flatten(0, 1)

    def blocks(self) -> list[nn.Module]:
        """The stock blocks."""
        return [*self.model.model.vision_tower.encoder.layer]

    def tower(self, grids: Tensor) -> Seen:
        """As the stock vision model; [CLS] is read behind the last two blocks."""
        tower = self.model.model.vision_tower
        x = tower.embeddings(grids)
        before = x
        for block in tower.encoder.layer:
            before, x = x, block(x)
        x = tower.layernorm(x)
        return Seen(self._shuffled(x[:, 1:]), [before[:, 0], x[:, 0]])

    def _shuffled(self, patches: Tensor) -> Tensor:
        side = round(patches.shape[1] ** 0.5)
        square = patches.unflatten(1, (side, side))
        shuffled: Tensor = self.model.model.pixel_shuffle(
            square, scale_factor=self.model.config.downsample_ratio
        )
        return shuffled.flatten(1, 2)

    def project(self, features: Tensor) -> Tensor:
        """The stock projector."""
        tokens: Tensor = self.model.model.multi_modal_projector(features)
        return tokens

    def cls_scores(self, grids: Tensor) -> Tensor:
        """Over the last third of the blocks; a token has the mean of its four patches."""
        tower = self.model.model.vision_tower
        x, blocks = tower.embeddings(grids), tower.encoder.layer
        score = x.new_zeros(len(x), x.shape[1] - 1)
        for i, block in enumerate(blocks):
            if i >= _first_scored(blocks):
                score = score + _cls_row(block.attention, block.layernorm_before(x))
            x = block(x)
        return self._shuffled(score[..., None]).mean(-1)


def _first_scored(blocks: Sequence[nn.Module]) -> int:
    return len(blocks) - max(1, len(blocks) // 3)


def _cls_row(attention: Any, x: Tensor) -> Tensor:
    """Attention of the first row to the others, mean over heads, [G, N - 1]."""
    heads = attention.num_heads
    q = attention.q_proj(x[:, :1]).unflatten(-1, (heads, -1)).transpose(1, 2)
    k = attention.k_proj(x).unflatten(-1, (heads, -1)).transpose(1, 2)
    return ops.attention_rows(q, k, attention.scale)[:, 0, 1:]


class Qwen2VLTrainer(PackedTrainer):
    """No [CLS]; the tower rotates by row and column and takes frames two by two."""

    def __init__(self, *args: Any) -> None:
        """Wraps the tower's blocks, see `GridBlock`."""
        super().__init__(*args)
        # a plain list: the blocks are the model's already
        self._blocks = [GridBlock(block) for block in self.model.model.visual.blocks]
        self._waves: dict[tuple[int, int, torch.device], tuple[Tensor, Tensor]] = {}

    def widths(self) -> tuple[int, int]:
        """There is none."""
        return self.model.config.vision_config.embed_dim, 0

    def blocks(self) -> list[nn.Module]:
        """The wrapped blocks."""
        return [*self._blocks]

    def places(self, prompt: Prompt) -> Tensor:
        """The stock M-RoPE ids, [3, P]."""
        inputs = {
            name: value
            for name, value in prompt.inputs.items()
            if not name.startswith("pixel_values")
        }
        found: Tensor = self.model.model.get_rope_index(**inputs)[0][:, 0, : len(prompt.ids)]
        return found

    def grids(self, images: Tensor) -> Tensor:
        """Two frames of a clip are a grid, and so is a picture taken twice: [B·G, 2, 3, h, w]."""
        frames = self.normal(images)
        if images.shape[1] != FRAMES:
            frames = torch.repeat_interleave(frames, 2, 1)
        found: Tensor = frames.unflatten(1, (-1, 2)).flatten(0, 1)
        return found

    def tower(self, grids: Tensor) -> Seen:
        """As the stock vision model without its merger."""
        visual: Any = self.model.model.visual
        size, merge = visual.patch_embed.patch_size, visual.spatial_merge_size
        rows, columns = grids.shape[-2] // size, grids.shape[-1] // size
        cut = grids.unflatten(-1, (columns // merge, merge, size))
        cut = cut.unflatten(-4, (rows // merge, merge, size))
        # [G, frame, color, row, in row, y, column, in column, x]
        patches = cut.permute(0, 3, 6, 4, 7, 2, 1, 5, 8).flatten(5).flatten(1, 4)
        # under autocast a residual stream that starts in bf16 would stay in bf16
        x = F.linear(patches, visual.patch_embed.proj.weight.flatten(1)).float()
        cos, sin = self._rotation(rows, columns, x.device)
        for block in self._blocks:
            x = block(x, cos, sin)
        return Seen(x.unflatten(1, (-1, merge**2)).flatten(2), [])

    def _rotation(self, rows: int, columns: int, device: torch.device) -> tuple[Tensor, Tensor]:
        """The stock rotation of a grid, kept: its ids take a loop in Python."""
        from transformers.vision_utils import get_vision_position_ids

        key = (rows, columns, device)
        if key not in self._waves:
            visual = self.model.model.visual
            grid = torch.tensor([[1, rows, columns]], device=device)
            ids = get_vision_position_ids(grid, visual.spatial_merge_size)
            self._waves[key] = visual.rotary_pos_emb(torch.zeros(1, device=device), ids)
        return self._waves[key]

    def project(self, features: Tensor) -> Tensor:
        """The stock merger."""
        merger = self.model.model.visual.merger
        patches = features.unflatten(-1, (-1, features.shape[-1] // 4)).flatten(0, 2)
        tokens: Tensor = merger(patches).unflatten(0, features.shape[:2])
        return tokens


class GridBlock(nn.Module):
    """A stock block of Qwen2-VL's tower on [G, n, width]: each grid attends to itself.

    The stock attention splits a packed row into a list of grids, hundreds in a training batch.
    """

    def __init__(self, block: Any) -> None:
        """Uses the weights of `block`."""
        super().__init__()
        self.block = block

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """One block; `cos` and `sin` [n, head width]."""
        block: Any = self.block
        attention = block.attn
        qkv = attention.qkv(block.norm1(x)).unflatten(-1, (3, attention.num_heads, -1))
        q, k, v = qkv.permute(2, 0, 3, 1, 4)  # [G, H, n, d] each
        q, k = (_rotated(t, cos, sin).to(v.dtype) for t in (q, k))
        y = F.scaled_dot_product_attention(q, k, v, scale=attention.scaling)
        x = x + attention.proj(y.transpose(1, 2).flatten(2))
        out: Tensor = x + block.mlp(block.norm2(x))
        return out


def _rotated(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    first, second = x.float().chunk(2, -1)
    return x.float() * cos + torch.cat([-second, first], -1) * sin


TRAINERS: dict[str, type[PackedTrainer]] = {
    "llava": LlavaTrainer,
    "qwen2_vl": Qwen2VLTrainer,
    "internvl": InternVLTrainer,
}
