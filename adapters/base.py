"""What an adapter tells about a family: where things are. No algorithm, no method name."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor, nn

Grid = tuple[int, int, int]


@dataclass(frozen=True)
class Encoder:
    """The vision encoder of one model.

    Attributes:
        attentions: the self-attention module of each block, in order.
        tap: index of the block whose output the projector reads.
        has_cls: whether token 0 is a [CLS].
    """

    attentions: tuple[nn.Module, ...]
    tap: int
    has_cls: bool

    @property
    def depth(self) -> int:
        """Number of blocks."""
        return len(self.attentions)


class Adapter(ABC):
    """Describes one model of a family to the runtime.

    Args:
        model: a stock transformers model whose `config.model_type` is in `model_types`.

    Attributes:
        supported: the class and its models, for error messages.
        visual_inputs: keyword inputs that belong to pixels; a prompt of embeddings goes without
            them.
        feature_options: names in the model's config that a call may override and that decide which
            features the encoder gives.
    """

    model_types: ClassVar[tuple[str, ...]]
    supported: ClassVar[str]
    visual_inputs: ClassVar[tuple[str, ...]]
    feature_options: ClassVar[tuple[str, ...]] = ()

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
    @abstractmethod
    def image_token_id(self) -> int:
        """The placeholder id that one visual token takes in `input_ids`."""

    @abstractmethod
    def has_images(self, inputs: Mapping[str, Any]) -> bool:
        """Whether pixels come with these keyword inputs of the model."""

    @abstractmethod
    def grids(self, inputs: Mapping[str, Any]) -> list[Grid]:
        """`(t, h, w)` in LLM tokens of each image, in order."""

    @abstractmethod
    def pixels(self, inputs: Mapping[str, Any]) -> list[Tensor]:
        """The pixel tensor of each image, in order."""

    @abstractmethod
    def encode_resized(
        self, inputs: Mapping[str, Any], sizes: list[tuple[int, int]]
    ) -> list[Tensor]:
        """Projected tokens `[h·w, D]` of each image resized to an h×w grid of LLM tokens."""
