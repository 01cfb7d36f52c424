"""Before anything is timed: patched models against plain torch on eager attention.

A copy with few layers gives the last token's first logits of each provider. In bfloat16 their error
against the plain float32 model may be at most twice that of the plain bfloat16 one. In float32 it
may be 2⁻⁸ of the plain bfloat16 error: float32 rounds 2¹⁶ times finer, and half of those bits are
left for sums in another order.
"""

from __future__ import annotations

import copy
import importlib.util
import sys
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from prefill.providers import Provider, gated
from prefill.sizes import Size
from vtc.adapters.registry import adapter_of
from vtc.bench.shapes import build

LAYERS = 4
PROMPTS = 2
_KIT = Path(__file__).parents[2] / "tests" / "kit" / "plain_rows.py"


class ParityError(Exception):
    """A patched model is not what it should be."""


@dataclass(frozen=True)
class Parity:
    """Largest errors of the logits against plain float32, and what they may be."""

    error_bf16: float
    limit_bf16: float
    error_fp32: float
    limit_fp32: float

    @property
    def green(self) -> bool:
        """Whether both are small enough; a NaN is not."""
        return self.error_bf16 <= self.limit_bf16 and self.error_fp32 <= self.limit_fp32


def check(size: Size, device: str) -> dict[str, dict[str, float]]:
    """Errors and limits by provider name.

    Raises:
        ParityError: one is above its limit.
    """
    low = build(size, device, torch.bfloat16, min(LAYERS, size.decoder.layers))
    models = {torch.bfloat16: low, torch.float32: copy.deepcopy(low).float()}
    found = {one.name: parity(size, models, one) for one in gated(low)}
    red = [f"{name}: {result}" for name, result in found.items() if not result.green]
    if red:
        raise ParityError(
            f"{size.name} with {len(adapter_of(low).language_model.layers)} layers: "  # type: ignore[arg-type]
            f"logits differ from plain torch by more than rounding: {'; '.join(red)}"
        )
    return {name: asdict(result) for name, result in found.items()}


def parity(size: Size, models: Mapping[torch.dtype, Any], provider: Provider) -> Parity:
    """Of one provider, on the same weights in both dtypes."""
    errors, plain_errors = {}, {}
    for dtype, model in models.items():
        inputs = size.inputs(PROMPTS, torch.empty(0, dtype=dtype, device=model.device))
        got, handle = patched(model, provider, inputs)
        # the exact logits of what this run decided
        exact = models[torch.float32]
        whole = {k: v.float() if v.is_floating_point() else v for k, v in inputs.items()}
        want = plain(size, exact, provider, handle, whole)
        errors[dtype] = float((got - want).abs().max())
        plain_logits = plain(size, model, provider, handle, inputs)
        plain_errors[dtype] = float((plain_logits - want).abs().max())
    rounding = plain_errors[torch.bfloat16]
    return Parity(errors[torch.bfloat16], 2 * rounding, errors[torch.float32], rounding / 2**8)


def patched(model: Any, provider: Provider, inputs: dict[str, Tensor]) -> tuple[Tensor, Any]:
    """First logits `float32[B, V]` through the public interface, and the handle."""
    with provider.on(model) as handle:
        out = model.generate(
            **inputs,
            max_new_tokens=1,
            do_sample=False,
            return_dict_in_generate=True,
            output_logits=True,
        )
    return out.logits[0].float(), handle


@torch.no_grad()
def plain(
    size: Size, model: Any, provider: Provider, handle: Any, inputs: dict[str, Tensor]
) -> Tensor:
    """The same by the stock model on eager attention, told which layers or tokens were chosen."""
    batch = len(inputs["input_ids"])
    with ExitStack() as stack:
        if provider.kind == "rows":
            layers = [i for i, active in enumerate(handle.plans[0].active) if not active]
            if len(layers) != provider.layers:
                raise ParityError(f"{provider} skips layers {layers}, expected {provider.layers}")
            stack.enter_context(_restated(size, model, provider, layers, batch))
        else:
            depth = len(adapter_of(model).language_model.layers)  # type: ignore[arg-type]
            first = max(1, min(int(7 * depth / 8 + 0.5), depth - 1))
            selections = list(handle.token_selections)
            masks = {first: selections.pop()} if provider.method == "todre" else {}
            masks |= {0: selections.pop()} if selections else {}
            kept = {at: _columns(size, s.mask()).to(model.device) for at, s in masks.items()}
            stack.enter_context(_masked(model, kept))
        return model(**inputs, use_cache=False, logits_to_keep=1).logits[:, -1].float()  # type: ignore[no-any-return]


def _kit() -> Any:
    """The tests' plain layers, by path: `tests` may be another package's name."""
    name = "prefill_plain_rows"
    if name not in sys.modules:
        spec = importlib.util.spec_from_file_location(name, _KIT)
        if spec is None or spec.loader is None:
            raise FileNotFoundError(f"{_KIT} is not there, expected the repository's tests")
        sys.modules[name] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(sys.modules[name])
    return sys.modules[name]


def _restated(size: Size, model: Any, provider: Provider, layers: list[int], batch: int) -> Any:
    """The model with these layers written out."""
    kit = _kit()
    columns, _ = size.places()
    visual = torch.zeros(batch, size.entries(), dtype=torch.bool)
    visual[:, columns] = True
    behind = torch.zeros_like(visual)
    behind[:, -size.text[1] :] = True
    cells = torch.full((*visual.shape, 3), -1)
    parts = visual, cells, torch.ones_like(visual), behind
    rule = kit.Rule(attention=provider.skips == "ffn", ffn=provider.skips == "attention")
    prompt = kit.Prompt(*(part.to(model.device) for part in parts))
    return kit.restated(model, prompt, dict.fromkeys(layers, rule))


def _columns(size: Size, kept: Tensor) -> Tensor:
    """`bool[B, S]` of `bool[B, N]`: a newline token stays where a token of its row does."""
    columns, ends = size.places()
    kept = kept.cpu()[:, : size.visual]
    out = torch.ones(len(kept), size.entries(), dtype=torch.bool)
    out[:, columns] = kept
    for column, first, end in ends:
        out[:, column] = kept[:, first:end].any(-1)
    return out


@contextmanager
def _masked(model: Any, kept: Mapping[int, Tensor]) -> Iterator[None]:
    """Within it layers attend eagerly, from each of these on only to what was kept there."""
    language: Any = adapter_of(model).language_model
    before = language.config._attn_implementation
    language.config._attn_implementation = "eager"
    hooks = []
    for i, layer in enumerate(language.layers):
        gone = [~columns for first, columns in kept.items() if first <= i]
        if gone:
            away = torch.stack(gone).any(0)[:, None, None]

            def narrow(module: Any, args: Any, kwargs: Any, away: Tensor = away) -> Any:
                mask = kwargs["attention_mask"]
                lowest = torch.finfo(mask.dtype).min
                return args, {**kwargs, "attention_mask": mask.masked_fill(away, lowest)}

            hooks.append(layer.register_forward_pre_hook(narrow, with_kwargs=True))
    try:
        yield
    finally:
        language.config._attn_implementation = before
        for hook in hooks:
            hook.remove()
