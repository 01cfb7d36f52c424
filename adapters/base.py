"""What an adapter tells about a family: where things are. No algorithm, no method name."""

from __future__ import annotations

import inspect
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from vtc.errors import InputError, UnsupportedModeError

Grid = tuple[int, int, int]


@dataclass(frozen=True)
class Encoder:
    """The vision encoder of one model.

    Attributes:
        blocks: its blocks, in order.
        attentions: the self-attention module of each.
        tap: index of the block whose output the projector reads.
        has_cls: whether token 0 is a [CLS].
        packed: whether images stand one behind the other in one sequence `[patches, width]`,
            attended to in segments; otherwise rows `[R, patches, width]`.
        joints: modules that read whole rows of patches between or behind the blocks.
    """

    blocks: tuple[nn.Module, ...]
    attentions: tuple[nn.Module, ...]
    tap: int
    has_cls: bool
    packed: bool = False
    joints: tuple[nn.Module, ...] = ()

    @property
    def depth(self) -> int:
        """Number of blocks."""
        return len(self.blocks)


@dataclass(frozen=True)
class Visual:
    """One image or video of a call, in the order in which its tokens stand.

    Attributes:
        grids: `(t, h, w)` in LLM tokens of its parts: a thumbnail, a canvas of crops, tiles, ...
        newlines: `(first, end)` token ranges, ascending: a newline token stands behind each.
        rows: how many rows of the encoder it takes (crops, tiles or frames; 1 where images are
            packed).
        video: whether it is a video.
        overview: the part that shows the whole picture, where there are several.
    """

    grids: tuple[Grid, ...]
    newlines: tuple[tuple[int, int], ...] = ()
    rows: int = 1
    video: bool = False
    overview: int | None = None

    @property
    def tokens(self) -> int:
        """Visual tokens, newlines not counted."""
        return sum(t * h * w for t, h, w in self.grids)


class Adapter(ABC):
    """Describes one model of a family to the runtime.

    Args:
        model: a stock transformers model whose `config.model_type` is in `model_types`.

    Attributes:
        supported: the class and its models, for error messages.
        pixel_inputs: the keyword inputs that hold pixels, of images first, of videos second.
        visual_inputs: all keyword inputs that belong to pixels; a prompt of embeddings goes
            without them.
        feature_options: names in the model's config that a call may override and that decide which
            features the encoder gives.
        tiled: whether an image may be encoded as several crops or tiles.
        patches_per_token: how many patches become one LLM token.
    """

    model_types: ClassVar[tuple[str, ...]]
    supported: ClassVar[str]
    pixel_inputs: ClassVar[tuple[str, ...]] = ("pixel_values",)
    visual_inputs: ClassVar[tuple[str, ...]]
    feature_options: ClassVar[tuple[str, ...]] = ()
    tiled: ClassVar[bool] = False
    patches_per_token: int = 1

    def __init__(self, model: nn.Module) -> None:
        self.model: Any = model
        self.check()

    def check(self) -> None:
        """Raise `UnsupportedModelError` for a variant of the family that is not described."""
        return None

    @property
    def base(self) -> nn.Module:
        """The module that joins vision and language; its `forward` takes pixels and ids."""
        return self.model.model  # type: ignore[no-any-return]

    @property
    def language_model(self) -> nn.Module:
        """The text decoder without its head."""
        return self.model.model.language_model  # type: ignore[no-any-return]

    @property
    @abstractmethod
    def tower(self) -> nn.Module:
        """The vision tower."""

    @abstractmethod
    def encoder(self) -> Encoder:
        """Blocks, feature tap and [CLS] of the vision tower."""

    @property
    def image_token_id(self) -> int:
        """The placeholder id that one visual token of an image takes in `input_ids`."""
        return int(self.model.config.image_token_id)

    @property
    def video_token_id(self) -> int | None:
        """The same for videos; None where they have none of their own."""
        return None

    @property
    def deepstack_layers(self) -> int:
        """How many decoder layers have visual features added behind them."""
        return 0

    @property
    def newline(self) -> Tensor | None:
        """What stands at a newline token `[D]`; None in families without any."""
        return None

    @property
    def projects(self) -> bool:
        """Whether `project` can be asked for."""
        return False

    def project(self, features: Tensor) -> Tensor:
        """Features of the tap `[..., D]`, of patches, sums of patches or a [CLS], as tokens of the
        LLM."""
        raise NotImplementedError(f"{type(self).__name__} does not project features one by one")

    def has_images(self, inputs: Mapping[str, Any]) -> bool:
        """Whether pixels come with these keyword inputs of the model."""
        return any(inputs.get(name) is not None for name in self.pixel_inputs)

    def position_ids(self, inputs: Mapping[str, Any]) -> Tensor | None:
        """Position ids that the stock forward makes of pixels and ids; None: it needs no pixels."""
        return None

    @abstractmethod
    def visuals(self, inputs: Mapping[str, Any], runs: list[int]) -> list[Visual]:
        """The images, then the videos, each in the order of their placeholders.

        `runs` holds the lengths of the stretches of image placeholders, row by row.
        """

    @abstractmethod
    def pixels(self, inputs: Mapping[str, Any], visuals: list[Visual]) -> list[Tensor]:
        """The pixel tensor of each image or video, in order."""

    def units(self, patches: int) -> Tensor | None:
        """Which patches of a row make up each LLM token, `int64[U, m]`; None: patch by patch."""
        return None

    def pack(self, values: Tensor, inputs: Mapping[str, Any], which: int) -> Tensor:
        """Numbers of units `[C, R, U]` of image or video `which` as those of its LLM tokens
        `[C, N]`."""
        return values.flatten(1)

    def blends(self, inputs: Mapping[str, Any], which: int, visual: Visual) -> str | None:
        """Why one LLM token of it is made of several units, or None where it is not."""
        return None

    def unit_order(self, grids: Tensor) -> Tensor | None:
        """In packed encoders: which unit stands where in the sequence; None: in order."""
        return None

    def encode(self, inputs: Mapping[str, Any]) -> Tensor:
        """What the stock model puts at the placeholders of images, `[T, D]`, newlines too, image
        by image.

        Args:
            inputs: pixels on their device; what says their sizes on the CPU, so that nothing waits
                for the device.
        """
        features = self.projected(inputs)
        return features.flatten(0, 1) if isinstance(features, Tensor) else torch.cat(list(features))

    def projected(self, inputs: Mapping[str, Any]) -> Any:
        """What the stock model makes of images, one tensor or one each."""
        names = inspect.signature(self.model.model.get_image_features).parameters
        given = {n: inputs[n] for n in self.visual_inputs if n in names and n in inputs}
        given |= self.encoder_constants(inputs)
        return self.model.model.get_image_features(**given, return_dict=True).pooler_output

    def encoder_constants(self, inputs: Mapping[str, Any]) -> dict[str, Any]:
        """Keyword inputs of the encoder that follow from sizes alone, which it would compute on the
        host in each call."""
        return {}

    @abstractmethod
    def part(
        self, inputs: Mapping[str, Any], visuals: list[Visual], chosen: list[int]
    ) -> dict[str, Any]:
        """Pixel inputs of the chosen images and videos alone."""

    @abstractmethod
    def encode_resized(
        self, inputs: Mapping[str, Any], visuals: list[Visual], sizes: list[tuple[int, int]]
    ) -> list[Tensor]:
        """Projected tokens `[t·h·w, D]` of the overview of each image (each frame of a video),
        resized to an h×w grid of LLM tokens."""


def check_pixels(pixels: Any, name: str, dims: int, what: str) -> Tensor:
    """`pixels` as a tensor of `dims` dimensions; raises `InputError` otherwise."""
    if not isinstance(pixels, Tensor) or pixels.dim() != dims:
        got = tuple(pixels.shape) if isinstance(pixels, Tensor) else type(pixels).__name__
        raise InputError(f"{name} is {got}, expected a tensor {what}: pass the processor's output")
    return pixels


def check_on_device(tower: nn.Module) -> None:
    """Refuse to interpolate position embeddings that are offloaded."""
    if any(weight.is_meta for weight in tower.parameters()):
        raise UnsupportedModeError(
            "the vision tower's weights are offloaded, expected them on a device: stock "
            "interpolation of position embeddings reads them as they are"
        )


def resized(pixels: Tensor, height: int, width: int) -> Tensor:
    """Antialiased bicubic resize of normalized pixels `[n, C, H, W]`."""
    small = F.interpolate(
        pixels.float(), size=(height, width), mode="bicubic", antialias=True, align_corners=False
    )
    return small.to(pixels.dtype)


def by_size(sizes: list[tuple[int, int]]) -> dict[tuple[int, int], list[int]]:
    """Which images are resized to each size."""
    return {
        size: [i for i, other in enumerate(sizes) if other == size] for size in dict.fromkeys(sizes)
    }


def as_list(value: Any) -> list[Any]:
    """A tensor, a sequence or None as a list of Python numbers."""
    if value is None:
        return []
    return value.tolist() if isinstance(value, torch.Tensor) else list(value)
