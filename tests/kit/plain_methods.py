"""What each method over decoder layers does, said layer by layer from the papers' definitions.
Nothing here looks at the package."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from fractions import Fraction
from typing import Any

import torch
from torch import Tensor

from .oracle import groups
from .plain import middles, parts_of
from .plain_rows import Prompt, Rule, Sinks, Var, is_sink
from .prompts import Inputs

Rules = dict[int, Rule]
# depth of the language models that layer 2, the first with sinks, was published for
PUBLISHED = 32


def prompt_of(model: Any, family: str, inputs: Inputs, there: Tensor | None = None) -> Prompt:
    """Where visual tokens stand, of those that are `there [B, S]`; by default all."""
    seen = inputs["attention_mask"].bool()
    visual, part = torch.zeros_like(seen), 0
    cells = torch.full((*seen.shape, 3), -1)
    which = {"image": 0, "video": 0}
    for group in groups(model, family, inputs):
        for start, (t, h, w) in parts_of(family, inputs, group, which[group.kind]):
            for i in range(t * h * w):
                row, column = group.tokens[start + i].tolist()
                frame, cell = divmod(i, h * w)
                cells[row, column] = torch.tensor([part + frame, cell // w, cell % w])
                visual[row, column] = True
            part += t
        which[group.kind] += 1
    if there is not None:
        visual &= there
    return Prompt(visual, cells, seen, behind(visual))


def behind(visual: Tensor) -> Tensor:
    """Entries behind the last visual token of their row; none in a row without, `bool[B, S]`."""
    out = torch.zeros_like(visual)
    for row, at in enumerate(visual):
        places = at.nonzero().flatten().tolist()
        if places:
            out[row, places[-1] + 1 :] = True
    return out


def count(keep: float, n: int) -> int:
    """How many of `n`."""
    return max(1, int(Fraction(keep) * n + Fraction(1, 2)))


def highest(values: Sequence[float], k: int) -> set[int]:
    """Indices of the k highest; the first of equals."""
    left, out = dict(enumerate(values)), set()
    for _ in range(k):
        best = max(left, key=lambda i: (left[i], -i))
        out.add(best)
        del left[best]
    return out


def first_with_sinks(depth: int, layer: int = 2) -> int:
    """A layer published for 32 layers."""
    return max(1, int(Fraction(layer * depth, PUBLISHED) + Fraction(1, 2)))


def _inactive(depth: int, keep: float | None, layers: Any, calibration: Any) -> set[int]:
    if layers is not None:
        return set(layers)
    assert keep is not None
    kept = highest(calibration.layer_contribution, count(keep, depth))
    return set(range(depth)) - kept


def naavit(
    depth: int,
    keep: float | None,
    layers: Any = None,
    skip_ffn: bool = False,
    calibration: Any = None,
) -> Rules:
    """Visual rows do not attend; with `skip_ffn` they skip the FFN too."""
    rule = Rule(attention=False, ffn=not skip_ffn)
    return dict.fromkeys(_inactive(depth, keep, layers, calibration), rule)


def shortv(depth: int, keep: float | None, layers: Any = None, calibration: Any = None) -> Rules:
    """Visual rows are frozen."""
    rule = Rule(attention=False, ffn=False)
    return dict.fromkeys(_inactive(depth, keep, layers, calibration), rule)


def ima_skip(
    depth: int,
    keep: float | None,
    operator: str = "ffn",
    interval: int | tuple[int, ...] | None = 2,
    start: int = 0,
    end: int | None = None,
) -> Rules:
    """Visual rows skip one or both halves of every so many layers."""
    rule = Rule(attention=operator == "ffn", ffn=operator == "attention")
    if interval is None:
        assert keep is not None
        left = set(range(depth)) - set(middles(depth, count(keep, depth)))
        return dict.fromkeys(left, rule)
    steps = (interval,) if isinstance(interval, int) else interval
    last = depth - 1 if end is None else end
    return {
        layer: rule
        for layer in range(depth)
        if start < layer < last and layer % steps[layer * len(steps) // depth] == 0
    }


def text_alone_from(depth: int, keep: float) -> int:
    """The first layer that YOPO leaves to text."""
    return count(keep, depth)


def yopo(
    depth: int,
    keep: float | None,
    window: int = 5,
    heads: float = 0.75,
    renormalize: bool = True,
    calibration: Any = None,
) -> Rules:
    """Visual rows see their neighbors; pruned heads have nothing to do with visual tokens."""
    assert keep is not None
    near = Rule(radius=(window - 1) // 2, renormalize=renormalize)
    rules = dict.fromkeys(range(text_alone_from(depth, keep)), near)
    if heads == 1.0:
        return rules
    ratios = calibration.head_ratio
    per_layer = len(ratios[0])
    flat = [ratio for layer in ratios[2:] for ratio in layer]
    kept = highest(flat, int(Fraction(heads) * len(flat) + Fraction(1, 2)))
    for layer in rules:
        if layer >= 2:
            first = (layer - 2) * per_layer
            own = tuple(first + h in kept for h in range(per_layer))
            rules[layer] = replace(near, heads=own)
    return rules


def text_alone(model: Any, family: str, inputs: Inputs, keep: float | None) -> dict[int, Tensor]:
    """YOPO's last layers do not see the picture."""
    assert keep is not None
    depth = len(model.model.language_model.layers)
    first = text_alone_from(depth, keep)
    nothing = torch.zeros_like(inputs["input_ids"], dtype=torch.bool)
    return {first: columns(model, family, inputs, nothing)} if first < depth else {}


def columns(model: Any, family: str, inputs: Inputs, visual: Tensor) -> Tensor:
    """Text, of visual tokens those in `visual [B, S]`, and newline tokens of their rows."""
    out = torch.ones_like(visual)
    for group in groups(model, family, inputs):
        left = visual[tuple(group.tokens.T)]
        out[tuple(group.tokens.T)] = left
        for newline in group.newlines:
            out[tuple(newline.place)] = bool(left[newline.members].any())
    return out


def entering(model: Any, inputs: Inputs, layer: int) -> Tensor:
    """`[B, S, D]`, what the stock model's layer gets."""
    seen = []

    def see(module: Any, args: Any, kwargs: Any) -> None:
        seen.append(args[0] if args else kwargs["hidden_states"])

    hook = model.model.language_model.layers[layer].register_forward_pre_hook(see, with_kwargs=True)
    try:
        with torch.no_grad():
            model(**inputs)
    finally:
        hook.remove()
    return seen[0]


def sinks_removed(
    model: Any,
    family: str,
    inputs: Inputs,
    layer: int = 2,
    tau: float = 20.0,
    dims: Any = None,
    calibration: Any = None,
    **others: Any,
) -> dict[int, Tensor]:
    """Visual tokens that are sinks at the input of a layer are gone from it on."""
    depth = len(model.model.language_model.layers)
    # where encoder features are added behind the first layers, not before the last of those
    adds = len(getattr(model.config.vision_config, "deepstack_visual_indexes", ()))
    first = max(first_with_sinks(depth, layer), adds)
    found = is_sink(entering(model, inputs, first), sinks_of(dims, tau, calibration))
    return {first: columns(model, family, inputs, ~found)}


def sinks_of(dims: Any, tau: float, calibration: Any = None) -> Sinks:
    """What a sink is."""
    return Sinks(tuple(calibration.sink_dims if dims is None else dims), tau)


def sink_removal(
    depth: int,
    keep: float | None,
    mode: str = "remove",
    layer: int = 2,
    tau: float = 20.0,
    dims: Any = None,
    calibration: Any = None,
) -> Rules:
    """Text does not read visual sinks; to remove them is a cut, see `sinks_at`."""
    if mode == "remove":
        return {}
    rule = Rule(sinks=sinks_of(dims, tau, calibration), blind=True)
    return dict.fromkeys(range(first_with_sinks(depth), depth), rule)


def var(
    depth: int,
    keep: float | None,
    tau: float = 20.0,
    rho: float = 0.5,
    p: float = 0.6,
    least: float = 0.2,
    dims: Any = None,
    calibration: Any = None,
    except_last: bool = False,
) -> Rules:
    """In heads that look at the image sinks give attention away."""
    rule = Rule(sinks=sinks_of(dims, tau, calibration), var=Var(rho, p, least))
    return dict.fromkeys(range(first_with_sinks(depth), depth - except_last), rule)


def together(*given: Rules) -> Rules:
    """Several methods in the same layers, one of which at most says anything of sinks."""
    out: Rules = {}
    for rules in given:
        for layer, rule in rules.items():
            before = out.get(layer, Rule())
            assert before.sinks is None or rule.sinks is None
            assert before.heads is None or rule.heads is None
            assert before.radius is None or rule.radius is None
            out[layer] = Rule(
                attention=before.attention and rule.attention,
                ffn=before.ffn and rule.ffn,
                radius=before.radius if rule.radius is None else rule.radius,
                heads=before.heads or rule.heads,
                renormalize=before.renormalize if before.heads else rule.renormalize,
                sinks=before.sinks or rule.sinks,
                blind=before.blind or rule.blind,
                var=before.var or rule.var,
            )
    return out


ROWS: dict[str, Callable[..., Rules]] = {
    "naavit": naavit,
    "shortv": shortv,
    "ima_skip": ima_skip,
    "yopo": yopo,
    "sink_removal": sink_removal,
    "var": var,
}
