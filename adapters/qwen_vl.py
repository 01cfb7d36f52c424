"""The Qwen-VL lineage: images of any size packed into one sequence, four patches to a token,
M-RoPE; Qwen2.5-VL with windows, Qwen3-VL with DeepStack."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from vtc.adapters.base import (
    Adapter,
    Encoder,
    Grid,
    Visual,
    check_on_device,
    check_pixels,
    resized,
)
from vtc.dispatch import constant
from vtc.errors import InputError

_KINDS = (("pixel_values", "image_grid_thw"), ("pixel_values_videos", "video_grid_thw"))


class Qwen2VLAdapter(Adapter):
    """`Qwen2VLForConditionalGeneration`."""

    model_types: ClassVar[tuple[str, ...]] = ("qwen2_vl",)
    supported: ClassVar[str] = "Qwen2VLForConditionalGeneration (Qwen2-VL)"
    pixel_inputs: ClassVar[tuple[str, ...]] = ("pixel_values", "pixel_values_videos")
    # generate goes without the token types too: they are of the full prompt's length
    visual_inputs: ClassVar[tuple[str, ...]] = (
        "pixel_values",
        "image_grid_thw",
        "pixel_values_videos",
        "video_grid_thw",
        "second_per_grid_ts",
        "mm_token_type_ids",
    )

    def check(self) -> None:
        """Nothing varies."""
        self._merge = int(self.model.config.vision_config.spatial_merge_size)
        self.patches_per_token = self._merge**2

    @property
    def tower(self) -> nn.Module:
        """The vision transformer with its merger."""
        return self.model.model.visual  # type: ignore[no-any-return]

    def encoder(self) -> Encoder:
        """The last block is read, by the merger."""
        tower: Any = self.tower
        return Encoder(
            blocks=tuple(tower.blocks),
            attentions=tuple(block.attn for block in tower.blocks),
            tap=len(tower.blocks) - 1,
            has_cls=False,
            packed=True,
            joints=self._joints(),
        )

    def _joints(self) -> tuple[nn.Module, ...]:
        return (self.model.model.visual.merger,)

    @property
    def video_token_id(self) -> int:
        """`<|video_pad|>`."""
        return int(self.model.config.video_token_id)

    def _grids(self, inputs: Mapping[str, Any]) -> list[tuple[bool, list[int], Tensor]]:
        """Of each image, then each video: whether it is a video, (t, h, w) in patches, patches."""
        found = []
        for video, (pixels, grids) in enumerate(_KINDS):
            if inputs.get(pixels) is None:
                continue
            if inputs.get(grids) is None:
                raise InputError(
                    f"{pixels} came without {grids}, expected both: pass the processor's output"
                )
            patches = check_pixels(inputs[pixels], pixels, 2, "[patches, values]")
            sizes = [[int(n) for n in grid] for grid in inputs[grids]]
            lengths = [t * h * w for t, h, w in sizes]
            if sum(lengths) != len(patches):
                raise InputError(
                    f"{pixels} holds {len(patches)} patches, expected {sum(lengths)} for {grids}="
                    f"{sizes}: pass the processor's output"
                )
            parts = patches.split(lengths)
            found += [(bool(video), size, part) for size, part in zip(sizes, parts, strict=True)]
        return found

    def visuals(self, inputs: Mapping[str, Any], runs: list[int]) -> list[Visual]:
        """Images, then videos."""
        merge = self._merge
        return [
            Visual(((t, h // merge, w // merge),), video=video)
            for video, (t, h, w), _ in self._grids(inputs)
        ]

    def position_ids(self, inputs: Mapping[str, Any]) -> Tensor | None:
        """M-RoPE; the model remembers its offset for later steps, as it does in stock calls."""
        given = {
            name: inputs.get(name)
            for name in (
                "input_ids",
                "image_grid_thw",
                "video_grid_thw",
                "inputs_embeds",
                "attention_mask",
                "past_key_values",
                "mm_token_type_ids",
                *(("second_per_grid_ts",) if self._times else ()),
            )
        }
        return self.model.model.compute_3d_position_ids(**given)  # type: ignore[no-any-return]

    @property
    def _times(self) -> bool:
        names = inspect.signature(self.model.model.compute_3d_position_ids).parameters
        return "second_per_grid_ts" in names

    def encoder_constants(self, inputs: Mapping[str, Any]) -> dict[str, Any]:
        """Rotary positions on the device, the borders of images and frames on the CPU."""
        from transformers import vision_utils

        grids, device = inputs["image_grid_thw"], inputs["pixel_values"].device
        positions = vision_utils.get_vision_position_ids(grids, self._merge)
        return {
            "position_ids": constant(positions, device),
            **_borders("cu_seqlens", "max_seqlen", vision_utils.get_vision_cu_seqlens(grids)),
        }

    def pixels(self, inputs: Mapping[str, Any], visuals: list[Visual]) -> list[Tensor]:
        """Patches `[n, values]` of each."""
        return [patches for _, _, patches in self._grids(inputs)]

    def part(
        self, inputs: Mapping[str, Any], visuals: list[Visual], chosen: list[int]
    ) -> dict[str, Any]:
        """Patches and grids of the chosen images and videos."""
        grids, out = self._grids(inputs), dict[str, Any]()
        for video, (pixels, name) in enumerate(_KINDS):
            members = [grids[i] for i in chosen if grids[i][0] == bool(video)]
            if members:
                out[pixels] = torch.cat([patches for _, _, patches in members])
                sizes = [size for _, size, _ in members]
                out[name] = torch.tensor(sizes, device=inputs[name].device)
        if "pixel_values_videos" in out and inputs.get("second_per_grid_ts") is not None:
            images = sum(not video for video, _, _ in grids)
            seconds = [inputs["second_per_grid_ts"][i - images] for i in chosen if i >= images]
            out["second_per_grid_ts"] = torch.as_tensor(seconds)
        return out

    def encode_resized(
        self, inputs: Mapping[str, Any], visuals: list[Visual], sizes: list[tuple[int, int]]
    ) -> list[Tensor]:
        """Patches laid out as frames, resized, and cut into patches anew for the stock tower."""
        check_on_device(self.tower)
        small = [
            self._resized(patches, (t, h, w), size)
            for (_, (t, h, w), patches), size in zip(self._grids(inputs), sizes, strict=True)
        ]
        grids = [
            (v.grids[0][0], h * self._merge, w * self._merge)
            for v, (h, w) in zip(visuals, sizes, strict=True)
        ]
        found: list[Tensor] = []
        for video in (False, True):
            members = [i for i, v in enumerate(visuals) if v.video == video]
            if not members:
                continue
            patch_grids = torch.tensor([grids[i] for i in members], device=small[0].device)
            pixels = torch.cat([small[i] for i in members])
            model = self.model.model
            output = (
                model.get_video_features(pixels, patch_grids, return_dict=True)
                if video
                else model.get_image_features(pixels, patch_grids, return_dict=True)
            )
            found += self._features(output, [len(p) for p in output.pooler_output])
        return found

    def _features(self, output: Any, lengths: list[int]) -> list[Tensor]:
        """What the language model gets of each image: tokens, and what is added later."""
        return list(output.pooler_output)

    def _resized(self, patches: Tensor, grid: Grid, size: tuple[int, int]) -> Tensor:
        """Patches of frames of t×h×w patches -> those of frames of `size` tokens."""
        config, m = self.model.config.vision_config, self._merge
        p, frames = int(config.patch_size), int(config.temporal_patch_size)
        t, h, w = grid
        # a patch holds channels, frames, rows, columns; patches of a token stand together
        blocks = patches.view(t, h // m, w // m, m, m, -1, frames, p, p)
        pixels = blocks.permute(0, 6, 5, 1, 3, 7, 2, 4, 8).reshape(t * frames, -1, h * p, w * p)
        h, w = size
        small = resized(pixels, h * m * p, w * m * p)
        blocks = small.view(t, frames, -1, h, m, p, w, m, p)
        return blocks.permute(0, 3, 6, 4, 7, 2, 1, 5, 8).reshape(t * h * w * m * m, -1)


class Qwen25VLAdapter(Qwen2VLAdapter):
    """`Qwen2_5_VLForConditionalGeneration`: most blocks attend within windows, in whose order the
    sequence stands."""

    model_types: ClassVar[tuple[str, ...]] = ("qwen2_5_vl",)
    supported: ClassVar[str] = "Qwen2_5_VLForConditionalGeneration (Qwen2.5-VL)"

    def unit_order(self, grids: Tensor) -> Tensor:
        """The stock window index."""
        from transformers.vision_utils import get_vision_window_index

        config = self.model.config.vision_config
        index, _ = get_vision_window_index(
            grids, config.spatial_merge_size, config.window_size, config.patch_size
        )
        return index  # type: ignore[no-any-return]

    def encoder_constants(self, inputs: Mapping[str, Any]) -> dict[str, Any]:
        """The windows too."""
        from transformers.vision_utils import get_vision_window_index

        config = self.model.config.vision_config
        index, windows = get_vision_window_index(
            inputs["image_grid_thw"],
            config.spatial_merge_size,
            config.window_size,
            config.patch_size,
        )
        return super().encoder_constants(inputs) | {
            "window_index": constant(index, inputs["pixel_values"].device),
            **_borders("cu_window_seqlens", "max_window_seqlen", windows),
        }


def _borders(name: str, longest: str, borders: Tensor) -> dict[str, Any]:
    """Borders of segments on the CPU, with the length of the longest."""
    return {name: borders, longest: int(borders.diff().max())}


class Qwen3VLAdapter(Qwen2VLAdapter):
    """`Qwen3VLForConditionalGeneration`: features of inner blocks are added behind the first
    decoder layers."""

    model_types: ClassVar[tuple[str, ...]] = ("qwen3_vl",)
    supported: ClassVar[str] = "Qwen3VLForConditionalGeneration (Qwen3-VL)"

    def _joints(self) -> tuple[nn.Module, ...]:
        visual = self.model.model.visual
        return (visual.merger, *visual.deepstack_merger_list)

    @property
    def deepstack_layers(self) -> int:
        """One for each inner block that is read."""
        return len(self.model.config.vision_config.deepstack_visual_indexes)

    def _features(self, output: Any, lengths: list[int]) -> list[Tensor]:
        """Tokens and the DeepStack features, side by side."""
        deep = [
            layer.split(lengths) if isinstance(layer, Tensor) else layer
            for layer in output.deepstack_features
        ]
        return [
            torch.cat([tokens, *(layer[i] for layer in deep)], -1)
            for i, tokens in enumerate(output.pooler_output)
        ]
