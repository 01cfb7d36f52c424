"""The LLaVA lineage: LLaVA-1.5 (one square grid), LLaVA-NeXT and LLaVA-OneVision (a thumbnail and a
canvas of crops, newline tokens), with a CLIP (with [CLS]) or SigLIP tower."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import groupby
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from vtc.adapters.base import (
    Adapter,
    Encoder,
    Visual,
    as_list,
    by_size,
    check_on_device,
    check_pixels,
    resized,
)
from vtc.dispatch import constant
from vtc.errors import InputError, UnsupportedModeError, UnsupportedModelError
from vtc.runtime.attributes import replaced

_LAYOUTS = 256  # of sizes, that are remembered
_TOWERS_WITH_CLS = {"clip_vision_model": True, "siglip_vision_model": False}


class LlavaAdapter(Adapter):
    """`LlavaForConditionalGeneration`."""

    model_types: ClassVar[tuple[str, ...]] = ("llava",)
    supported: ClassVar[str] = "LlavaForConditionalGeneration (LLaVA-1.5)"
    visual_inputs: ClassVar[tuple[str, ...]] = ("pixel_values", "image_sizes")
    feature_options: ClassVar[tuple[str, ...]] = (
        "vision_feature_layer",
        "vision_feature_select_strategy",
    )

    def check(self) -> None:
        """Refuse towers and feature layers for which tokens are not the patches of one grid."""
        config = self.model.config
        tower = config.vision_config.model_type
        if tower not in _TOWERS_WITH_CLS:
            raise UnsupportedModelError(
                f"this LLaVA has a vision tower of type {tower!r}; expected one of "
                f"{sorted(_TOWERS_WITH_CLS)}"
            )
        wanted = "default" if _TOWERS_WITH_CLS[tower] else "full"
        got = config.vision_feature_select_strategy
        if got != wanted:
            raise UnsupportedModelError(
                f"vision_feature_select_strategy={got!r} with a {tower} tower gives tokens that "
                f"are not its patches; expected {wanted!r}: set "
                "model.config.vision_feature_select_strategy"
            )

    @property
    def tower(self) -> nn.Module:
        """CLIP or SigLIP."""
        return self.model.model.vision_tower  # type: ignore[no-any-return]

    def encoder(self) -> Encoder:
        """Blocks of the tower; the tap is the deepest block among `vision_feature_layer`."""
        config = self.model.config
        tower: Any = getattr(self.tower, "vision_model", self.tower)
        blocks = tower.encoder.layers
        # hidden_states has one entry more than there are blocks: the embeddings come first
        entries = [i % (len(blocks) + 1) for i in self._layers()]
        return Encoder(
            blocks=tuple(blocks),
            attentions=tuple(block.self_attn for block in blocks),
            tap=max(entries) - 1,
            has_cls=_TOWERS_WITH_CLS[config.vision_config.model_type],
        )

    @property
    def projects(self) -> bool:
        """Where features are those of one block."""
        return len(self._layers()) == 1

    def project(self, features: Tensor) -> Tensor:
        """Through the projector."""
        return self.model.model.multi_modal_projector(features)  # type: ignore[no-any-return]

    def _layers(self) -> list[int]:
        layers = self.model.config.vision_feature_layer
        return list(layers) if isinstance(layers, list | tuple) else [layers]

    def _patch(self) -> int:
        return int(self.model.config.vision_config.patch_size)

    def visuals(self, inputs: Mapping[str, Any], runs: list[int]) -> list[Visual]:
        """All images of a call have one size."""
        pixels = self._checked(inputs, "pixel_values", 4, "images")
        images, _, height, width = pixels.shape
        return [Visual(((1, height // self._patch(), width // self._patch()),))] * images

    def _checked(self, inputs: Mapping[str, Any], name: str, dims: int, what: str) -> Tensor:
        channels = self.model.config.vision_config.num_channels
        expected = f"[{what}, {channels}, height, width]"
        pixels = check_pixels(inputs[name], name, dims, expected)
        if pixels.shape[-3] != channels:
            raise InputError(
                f"{name} is {tuple(pixels.shape)}, expected a tensor {expected}: pass the "
                "processor's output"
            )
        return pixels

    def pixels(self, inputs: Mapping[str, Any], visuals: list[Visual]) -> list[Tensor]:
        """One `[3, H, W]` per image."""
        return list(inputs["pixel_values"])

    def part(
        self, inputs: Mapping[str, Any], visuals: list[Visual], chosen: list[int]
    ) -> dict[str, Any]:
        """Rows of the pixels."""
        out: dict[str, Any] = {"pixel_values": inputs["pixel_values"][chosen]}
        if inputs.get("image_sizes") is not None:
            out["image_sizes"] = inputs["image_sizes"][chosen]
        return out

    def encode_resized(
        self, inputs: Mapping[str, Any], visuals: list[Visual], sizes: list[tuple[int, int]]
    ) -> list[Tensor]:
        """Antialiased bicubic resize of the normalized pixels, then the stock tower with
        interpolated positions."""
        check_on_device(self.tower)
        frames = self._overviews(inputs, visuals)
        found: list[Tensor] = [torch.empty(0)] * len(sizes)
        for (h, w), members in by_size(sizes).items():
            pixels = torch.cat([frames[i] for i in members])
            small = resized(pixels, h * self._patch(), w * self._patch())
            parts = self._project(small).split([len(frames[i]) for i in members])
            for i, tokens in zip(members, parts, strict=True):
                found[i] = tokens.flatten(0, 1)
        return found

    def _overviews(self, inputs: Mapping[str, Any], visuals: list[Visual]) -> list[Tensor]:
        """What shows the whole of each image (all frames of each video), `[rows, 3, H, W]`."""
        return [pixels[None] for pixels in inputs["pixel_values"]]

    def _project(self, pixels: Tensor) -> Tensor:
        """`[n, 3, h·p, w·p]` -> projected tokens `[n, h·w, D]`, nothing packed."""
        hidden = self.tower(
            pixels, interpolate_pos_encoding=True, output_hidden_states=True
        ).hidden_states
        features = torch.cat([hidden[layer] for layer in self._layers()], -1)
        if self.encoder().has_cls:
            features = features[:, 1:]
        return self.model.model.multi_modal_projector(features)  # type: ignore[no-any-return]


class LlavaNextAdapter(LlavaAdapter):
    """`LlavaNextForConditionalGeneration`: a thumbnail, then the crops joined into one canvas whose
    padding is cut off, with a newline token behind each of its rows."""

    model_types: ClassVar[tuple[str, ...]] = ("llava_next",)
    supported: ClassVar[str] = "LlavaNextForConditionalGeneration (LLaVA-NeXT)"
    tiled: ClassVar[bool] = True

    def check(self) -> None:
        """As in LLaVA-1.5."""
        super().check()
        self._layouts: dict[tuple[int, ...], Visual] = {}

    @property
    def newline(self) -> Tensor:
        """A weight of the model."""
        return self.model.model.image_newline  # type: ignore[no-any-return]

    def _side(self) -> int:
        return int(self.model.config.vision_config.image_size) // self._patch()

    def _rows(self, inputs: Mapping[str, Any]) -> list[int]:
        """Crops of each image, the thumbnail included."""
        from transformers.models.llava_next.modeling_llava_next import image_size_to_num_patches

        config, sizes = self.model.config, inputs.get("image_sizes")
        if sizes is None:
            raise InputError(
                "pixel_values came without image_sizes, expected both: pass the processor's output"
            )
        size = config.vision_config.image_size
        return [image_size_to_num_patches(s, config.image_grid_pinpoints, size) for s in sizes]

    def visuals(self, inputs: Mapping[str, Any], runs: list[int]) -> list[Visual]:
        """Grids and newlines as the stock packing makes them."""
        if isinstance(pixels := inputs.get("pixel_values"), Tensor) and pixels.dim() == 4:
            self._checked(inputs, "pixel_values", 4, "crops")
        else:
            self._checked(inputs, "pixel_values", 5, "images, crops")
        return [self._layout(inputs, i, rows) for i, rows in enumerate(self._rows(inputs))]

    def _layout(self, inputs: Mapping[str, Any], which: int, rows: int) -> Visual:
        # stock packing says it by packing
        key = (*as_list(inputs["image_sizes"][which]), rows)
        if key not in self._layouts:
            if len(self._layouts) >= _LAYOUTS:
                self._layouts.clear()
            self._layouts[key] = self._new_layout(inputs, which, rows)
        return self._layouts[key]

    def _new_layout(self, inputs: Mapping[str, Any], which: int, rows: int) -> Visual:
        side = self._side()
        packed = self._packed(torch.zeros(rows, side * side, 1), inputs, which)[:, 0]
        ends = packed.isnan().nonzero()[:, 0].tolist()
        ends = [end - i for i, end in enumerate(ends)]  # newlines not counted
        base = side * side
        if rows == 1:
            return Visual(((1, side, side),), ((0, base),))
        width = ends[0] - base
        canvas = (1, len(ends), width)
        newlines = tuple((end - width, end) for end in ends)
        return Visual(((1, side, side), canvas), newlines, rows, overview=0)

    def _packed(self, features: Tensor, inputs: Mapping[str, Any], which: int) -> Tensor:
        """Stock packing of `[R, U, C]` with NaN for newlines: `[N + newlines, C]`."""
        newline = features.new_full((features.shape[-1],), float("nan"))
        strategy = self.model.config.vision_feature_select_strategy
        # the class's own: `encode` keeps that of the model away for as long as the encoder runs
        model = self.model.model
        found, _ = type(model).pack_image_features(
            model,
            [features],
            inputs["image_sizes"][which : which + 1],
            vision_feature_select_strategy=strategy,
            image_newline=newline,
        )
        return found[0]  # type: ignore[no-any-return]

    def encode(self, inputs: Mapping[str, Any]) -> Tensor:
        """Laid out by what the stock packing does to numbers of units: it copies lengths to the
        device in between, which waits for it."""

        def unpacked(features: Any, *args: Any, **kwargs: Any) -> Any:
            return list(features), None

        with replaced(self.model.model, "pack_image_features", unpacked):
            crops = self.projected(inputs)
        return torch.cat([self._laid_out(units, inputs, i) for i, units in enumerate(crops)])

    def _laid_out(self, units: Tensor, inputs: Mapping[str, Any], which: int) -> Tensor:
        """`[R, U, D]` of an image in the order of its placeholders."""
        rows, count, _ = units.shape
        numbers = torch.arange(rows * count, dtype=torch.float32).view(rows, count, 1)
        order = self._packed(numbers, inputs, which)[:, 0]  # NaN: a newline
        found = units.flatten(0, 1)[constant(order.nan_to_num(0).long(), units.device)]
        ends = constant(order.isnan(), units.device)[:, None]
        return torch.where(ends, self.newline.to(found), found)

    def pack(self, values: Tensor, inputs: Mapping[str, Any], which: int) -> Tensor:
        """Through the stock packing, newlines left out."""
        mark = torch.zeros_like(values[:1])  # what a newline is must not be read off a score
        packed = self._packed(torch.cat([values, mark]).permute(1, 2, 0), inputs, which)
        return packed[~packed[:, -1].isnan(), :-1].T

    def pixels(self, inputs: Mapping[str, Any], visuals: list[Visual]) -> list[Tensor]:
        """The crops `[R, 3, H, W]` of each image."""
        pixels, rows = inputs["pixel_values"], self._rows(inputs)
        if pixels.dim() == 4:
            return list(pixels.split(rows))
        return [crops[:n] for crops, n in zip(pixels, rows, strict=True)]

    def _overviews(self, inputs: Mapping[str, Any], visuals: list[Visual]) -> list[Tensor]:
        return [crops[:1] for crops in self.pixels(inputs, visuals)]

    def part(
        self, inputs: Mapping[str, Any], visuals: list[Visual], chosen: list[int]
    ) -> dict[str, Any]:
        """Crops of the chosen images, as one stack."""
        crops = self.pixels(inputs, visuals)
        return {
            "pixel_values": torch.cat([crops[i] for i in chosen]),
            "image_sizes": inputs["image_sizes"][chosen],
        }


class LlavaOnevisionAdapter(LlavaNextAdapter):
    """`LlavaOnevisionForConditionalGeneration`: as LLaVA-NeXT for an image alone in its row;
    several images are a thumbnail each; frames of a video are pooled and end with one newline."""

    model_types: ClassVar[tuple[str, ...]] = ("llava_onevision",)
    supported: ClassVar[str] = "LlavaOnevisionForConditionalGeneration (LLaVA-OneVision)"
    pixel_inputs: ClassVar[tuple[str, ...]] = ("pixel_values", "pixel_values_videos")
    visual_inputs: ClassVar[tuple[str, ...]] = (
        "pixel_values",
        "image_sizes",
        "pixel_values_videos",
        "image_sizes_videos",
        "batch_num_images",
    )
    feature_options: ClassVar[tuple[str, ...]] = (
        "vision_feature_layer",
        "vision_feature_select_strategy",
        "vision_aspect_ratio",
    )

    @property
    def projects(self) -> bool:
        """Never: tokens of videos and of large canvases are pooled behind the projector."""
        return False

    @property
    def video_token_id(self) -> int:
        """`<video>`."""
        return int(self.model.config.video_token_id)

    def _rows(self, inputs: Mapping[str, Any]) -> list[int]:
        crops = super()._rows(inputs)
        counts = as_list(inputs.get("batch_num_images")) or [1] * len(crops)
        cut = [n == 1 for n in counts for _ in range(n)]
        if len(cut) < len(crops):
            raise InputError(
                f"batch_num_images={counts} counts {len(cut)} images, expected {len(crops)}: pass "
                "the processor's output"
            )
        # stock reads no further than there are images, too
        return [n if each else 1 for n, each in zip(crops, cut, strict=False)]

    def visuals(self, inputs: Mapping[str, Any], runs: list[int]) -> list[Visual]:
        """Images, then videos."""
        found = super().visuals(inputs, runs) if inputs.get("pixel_values") is not None else []
        if inputs.get("pixel_values_videos") is None:
            return found
        videos = self._checked(inputs, "pixel_values_videos", 5, "videos, frames")
        count, frames = videos.shape[:2]
        half = -(-self._side() // 2)
        tokens = frames * half * half
        video = Visual(((frames, half, half),), ((0, tokens),), frames, video=True)
        return found + [video] * count

    def _images(self, inputs: Mapping[str, Any]) -> int:
        return len(self._rows(inputs)) if inputs.get("pixel_values") is not None else 0

    def _packed(self, features: Tensor, inputs: Mapping[str, Any], which: int) -> Tensor:
        model = self.model.model
        found, _ = type(model).pack_image_features(
            model,
            [features],
            inputs["image_sizes"][which : which + 1],
            image_newline=features.new_full((features.shape[-1],), float("nan")),
            vision_aspect_ratio=self.model.config.vision_aspect_ratio,
        )
        return found[0]  # type: ignore[no-any-return]

    def pack(self, values: Tensor, inputs: Mapping[str, Any], which: int) -> Tensor:
        """Images as in LLaVA-NeXT; frames through the stock pooling."""
        if which < self._images(inputs):
            return super().pack(values, inputs, which)
        pooled = self.model.model.apply_pooling(values.permute(1, 2, 0))
        return pooled.flatten(0, 1).T  # type: ignore[no-any-return]

    def blends(self, inputs: Mapping[str, Any], which: int, visual: Visual) -> str | None:
        """Frames are pooled; a canvas beyond the largest is made smaller."""
        if visual.video:
            return "its frames are pooled, one token from several patches"
        if visual.rows == 1:
            return None
        side = self._side()
        ramp = torch.arange(float(visual.rows * side * side)).view(1, visual.rows, -1)
        if torch.equal(packed := self.pack(ramp, inputs, which), packed.round()):
            return None
        return "its canvas of crops is made smaller, one token from several patches"

    def pixels(self, inputs: Mapping[str, Any], visuals: list[Visual]) -> list[Tensor]:
        """Crops `[R, 3, H, W]` of each image, frames of each video."""
        found = super().pixels(inputs, visuals) if self._images(inputs) else []
        videos = inputs.get("pixel_values_videos")
        return found if videos is None else found + list(videos)

    def _overviews(self, inputs: Mapping[str, Any], visuals: list[Visual]) -> list[Tensor]:
        found = self.pixels(inputs, visuals)
        return [x if v.video else x[:1] for x, v in zip(found, visuals, strict=True)]

    def part(
        self, inputs: Mapping[str, Any], visuals: list[Visual], chosen: list[int]
    ) -> dict[str, Any]:
        """Crops of the chosen images as one stack, the chosen videos."""
        images = self._images(inputs)
        first = [i for i in chosen if i < images]
        found: dict[str, Any] = super().part(inputs, visuals, first) if first else {}
        if first:
            found["batch_num_images"] = self._counts([visuals[i].rows > 1 for i in first])
        if videos := [i - images for i in chosen if i >= images]:
            found["pixel_values_videos"] = inputs["pixel_values_videos"][videos]
        return found

    def _counts(self, cut: list[bool]) -> Tensor:
        """`batch_num_images` that leaves the same images whole."""
        runs = [(each, len(list(group))) for each, group in groupby(cut)]
        counts: list[int] = []
        for i, (each, n) in enumerate(runs):
            if not each and n == 1 and i < len(runs) - 1:
                raise UnsupportedModeError(
                    "of several images in a row, one is behind the cache and images of other rows "
                    "follow it, expected the pixels of the new images alone: run the processor on "
                    "the new part of the conversation"
                )
            # one whole image at the end: stock reads no further than there are images
            counts += [1] * n if each else [max(n, 2)]
        return torch.tensor(counts)
