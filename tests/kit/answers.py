"""What a model answers, with the logits of every step."""

from __future__ import annotations

from typing import Any

from tests.kit.models import PLACEHOLDERS


def answered(model: Any, inputs: dict[str, Any], new_tokens: int, **more: Any) -> Any:
    """A greedy generate that never answers with a placeholder."""
    return model.generate(
        **inputs,
        max_new_tokens=new_tokens,
        do_sample=False,
        suppress_tokens=PLACEHOLDERS,
        return_dict_in_generate=True,
        output_logits=True,
        **more,
    )
