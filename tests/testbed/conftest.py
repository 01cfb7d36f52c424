"""Questions without their pictures, which are most of the work of drawing them."""

from __future__ import annotations

import importlib
from typing import Any

import pytest
import torch


@pytest.fixture
def unpainted(monkeypatch: pytest.MonkeyPatch) -> None:
    """The same words and answers with pictures of one black pixel: what is drawn for a picture is
    nothing that a question asks about."""
    module = importlib.import_module("vtc.testbed.examples")

    def paint(scene: Any, *_: Any) -> tuple[torch.Tensor, None]:
        return torch.zeros(len(scene.present), 3, 1, 1, dtype=torch.uint8), None

    def paint_all(scenes: Any, *_: Any) -> tuple[torch.Tensor, None]:
        return torch.stack([paint(scene)[0] for scene in scenes], 1), None

    monkeypatch.setattr(module, "paint", paint)
    monkeypatch.setattr(module, "paint_all", paint_all)
