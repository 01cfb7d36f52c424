"""An attention function that takes masks as flash attention does, and minds gaps as it does."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor


def like_flash(
    module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, **options: Any
) -> tuple[Tensor, None]:
    """Attention with a 2-D mask, aligned at the end; gaps in position ids are not allowed."""
    queries, keys = query.shape[2], key.shape[2]
    ids = options.get("position_ids")
    if ids is not None:
        assert ids.shape[-1] == queries
        assert len(query) > 1 or bool((ids.diff(dim=-1) == 1).all())
    heads = query.shape[1] // key.shape[1]
    seen = torch.ones(queries, keys, dtype=torch.bool).tril(keys - queries)[None, None]
    if mask is not None:
        seen = seen & mask[:, None, None].bool()
    out = torch.nn.functional.scaled_dot_product_attention(
        query,
        key.repeat_interleave(heads, 1),
        value.repeat_interleave(heads, 1),
        attn_mask=seen,
        scale=options["scaling"],
    )
    return out.transpose(1, 2), None


def use_like_flash(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Make the language model of `model` attend with it."""
    from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, flash_attention_mask
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    monkeypatch.setitem(ALL_ATTENTION_FUNCTIONS, "like_flash", like_flash)
    known = ALL_MASK_ATTENTION_FUNCTIONS._global_mapping
    monkeypatch.setitem(known, "like_flash", flash_attention_mask)
    model.model.language_model.config._attn_implementation = "like_flash"
