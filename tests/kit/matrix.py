"""Every family, every method of the registry and every way of running: what is compared with what,
what is refused, and which cells the default run covers."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import cache, lru_cache
from typing import Any

import pytest
import torch
from torch import Tensor

import vtc
from vtc.errors import UnsupportedModeError, VtcError
from vtc.types import Selection

from . import plain, plain_methods, plain_slots
from .fed import Fed, arguments, deepstack, fed, recorded
from .models import FAMILIES, PLACEHOLDERS, build_model
from .options import COMPOSED_ONLY, TAU, VARIANTS
from .oracle import (
    kept_columns,
    masked,
    masked_from_layer,
    merged_at_layer,
    rows_expanded_by_hand,
    sizes,
    weighed_from_layer,
)
from .plain_methods import Rules, prompt_of
from .plain_rows import Record, restated
from .prompts import Inputs, build_inputs, prompts

model_of = cache(build_model)
cached_inputs = cache(lambda family, prompt: build_inputs(family, prompts(family)[prompt]))

MIXED = "mixed: two images, one image, text only"
BOTH = "image and video, video, text only"
# the prompts of the default run; one of one row each for what takes one row, and where a family
# or method refuses the others
WIDE = ("batch 1", MIXED, BOTH)
# several rows of unequal length, one of them text only
RAGGED = (MIXED, BOTH)
# run in full by default: an encoder of crops and a packed one; the others pairwise, in CI's time
FULL = ("llava_next", "qwen3_vl")
MODES: dict[str, dict[str, Any]] = {
    "greedy": {},
    "beams": {"num_beams": 3},
    "sampled twice": {"do_sample": True, "num_return_sequences": 2},
    "static cache": {"cache_implementation": "static"},
    "prompt lookup": {"prompt_lookup_num_tokens": 2},
    "no cache": {"use_cache": False},
}
# what the oracle runs for those: the result does not depend on speculation, nor on a cache
SAME_AS = {"prompt lookup": "greedy"}

# methods that add the log of a token's size to attention
WEIGHED = ("pact",)
# decoder layers where four are too few: 7L/8 leaves one without visual tokens; three stages
LAYERS = {"todre": 8, "sparsevlm": 8}
KEEP = 0.4
# three of four layers see visual tokens, of which the last has its heads pruned
KEEPS = {"yopo": 0.75}


@dataclass(frozen=True)
class Spec:
    """A method with options and what it keeps."""

    name: str
    options: tuple[tuple[str, Any], ...] = ()
    layers: int | None = None

    def __str__(self) -> str:
        return " ".join([self.name, *(f"{k}={v}" for k, v in self.options)])

    def method(self, family: str) -> vtc.Method:
        """The method for a model of this family."""
        return vtc.method(self.name, **self.given(family))

    def given(self, family: str) -> dict[str, Any]:
        """Its options for a model of this family."""
        options = dict(self.options)
        if options.get("tau") == "between":
            options["tau"] = TAU[family][options.get("stage1", True) is False]
        if options.get("calibration") == "drawn":
            options["calibration"] = drawn(depth_of(self.model(family)))
        return options

    @property
    def keep(self) -> float | None:
        """What it keeps in the matrix."""
        kind = self.method(FAMILIES[0])
        if kind.name == "none" or kind.count == "adaptive":
            return None
        return KEEPS.get(self.name, KEEP)

    @property
    def over_layers(self) -> bool:
        """Whether it says what rows do in decoder layers."""
        return self.name in plain_methods.ROWS

    def rules(self, family: str) -> Rules:
        """What it says of them, independently stated."""
        if not self.over_layers:
            return {}
        depth = depth_of(self.model(family))
        return plain_methods.ROWS[self.name](depth, self.keep, **self.given(family))

    def cuts(self, family: str, inputs: Inputs) -> dict[int, Tensor]:
        """Columns `bool[B, S]` that layers see from one on, independently stated."""
        model, options = self.model(family), self.given(family)
        if self.name == "yopo":
            return plain_methods.text_alone(model, family, inputs, self.keep)
        if self.name == "sink_removal" and options.get("mode") != "mask":
            return plain_methods.sinks_removed(model, family, inputs, **options)
        return {}

    def model(self, family: str) -> Any:
        """The stock model it is tried on."""
        return model_of(family) if self.layers is None else model_of(family, layers=self.layers)


def depth_of(model: Any) -> int:
    """Decoder layers."""
    return len(model.model.language_model.layers)


@cache
def drawn(depth: int) -> vtc.calibration.Calibration:
    """A calibration of random numbers for this many layers of four heads."""
    generator = torch.Generator().manual_seed(depth)
    return vtc.calibration.Calibration(
        layer_contribution=tuple(torch.rand(depth, generator=generator).tolist()),
        sink_dims=(5, 60),
        head_ratio=tuple(map(tuple, torch.rand(depth, 4, generator=generator).tolist())),
    )


def specs_of(name: str) -> list[Spec]:
    """The runs of one method."""
    made = [tuple(options.items()) for options in VARIANTS.get(name, ({},))]
    return [Spec(name, options, LAYERS.get(name)) for options in made]


SPECS = [spec for name in vtc.methods() for spec in specs_of(name)]

# independent statements of methods that are not a mask
STATEMENTS: dict[str, Callable[..., tuple[Fed, Tensor]]] = {
    "average_pool": plain.average_pool,
    "downsample": plain.downsample,
}

Refusal = tuple[type[VtcError], str]
_POOLED: Refusal = (UnsupportedModeError, "got a video of which its frames are pooled, one token")
_SMALLER: Refusal = (
    UnsupportedModeError,
    "got an image of which its canvas of crops is made small",
)
IN_ENCODER = [name for name in vtc.methods() if vtc.method(name).site == "encoder"]
# (family, method, prompt): everything that is refused in the matrix
REFUSED: dict[tuple[str, str, str], Refusal] = {
    ("llava_onevision", method, prompt): refusal
    for method in IN_ENCODER
    for prompt, refusal in {
        "ragged": _SMALLER,
        MIXED: _SMALLER,
        "video": _POOLED,
        # the first that is looked at says why
        BOTH: _SMALLER,
        "video and image, image": _POOLED,
    }.items()
}


def refused_turn(family: str, method: str, conversation: str, pixels_of: str) -> Refusal | None:
    """What a conversation of tests/kit/turns.py is refused with."""
    if family != "llava_onevision" or method not in IN_ENCODER or conversation == "a text turn":
        return None
    return _POOLED if conversation == "a video, then an image" else _SMALLER


def accepted(family: str, spec: Spec, *, batch: int | None = None) -> list[str]:
    """The prompts that are not refused, or those of them of so many rows."""
    return [
        prompt
        for prompt, rows in prompts(family).items()
        if (family, spec.name, prompt) not in REFUSED and batch in (None, len(rows))
    ]


def some(family: str, spec: Spec, *, batch: int | None = None) -> list[str]:
    """Of the prompts that are not refused, what the default run takes where one shows enough: the
    ragged ones, but of families that are not run in full one by turns; or else what there is."""
    found = [prompt for prompt in accepted(family, spec, batch=batch) if prompt in WIDE]
    ragged = [prompt for prompt in found if prompt in RAGGED]
    if ragged and family not in FULL and spec in SPECS:
        return [ragged[(FAMILIES.index(family) + SPECS.index(spec)) % len(ragged)]]
    return ragged or found


def others(family: str, spec: Spec) -> list[str]:
    """Those of `WIDE` that `some` leaves to `make test-all`."""
    taken = some(family, spec)
    return [p for p in accepted(family, spec) if p in WIDE and p not in taken]


@dataclass
class Decision:
    """What a compressed run decided.

    Attributes:
        first: what reached the language model.
        later: what cuts between decoder layers left, by layer.
        said: what the encoder said.
    """

    first: Selection | None
    later: dict[int, Selection]
    report: Any
    said: list[Any] = field(default_factory=list)


@contextmanager
def patched(
    spec: Spec, family: str, keep: Any = "its own", **options: Any
) -> Iterator[Callable[[], Decision]]:
    """The family's model with the method on it; calling what is given tells its last decision."""
    model, chosen = spec.model(family), spec.keep if keep == "its own" else keep
    with recorded(model) as said, vtc.patch(model, spec.method(family), chosen, **options) as patch:

        def decision() -> Decision:
            call, heard = patch._session.last, list(said)
            said.clear()
            if call is None:
                return Decision(None, {}, None)
            later = dict(sorted(call.later.items()))
            assert patch.selections[-len(later) :] == list(later.values()) or not later
            return Decision(call.selection, later, patch.report(), heard)

        yield decision


def run(model: Any, inputs: Mapping[str, Any], **options: Any) -> Any:
    """The tokens that generate adds."""
    torch.manual_seed(3)
    given = {"max_new_tokens": 5, "suppress_tokens": PLACEHOLDERS, "do_sample": False, **options}
    out = model.generate(**inputs, **given)
    if "input_ids" not in inputs or not isinstance(out, Tensor):
        return out
    return out[:, inputs["input_ids"].shape[1] :]


@cache
def stock(family: str, layers: int | None, prompt: str) -> Any:
    """What the stock model with so many layers adds, with logits, and its output of a forward."""
    model, inputs = Spec("none", layers=layers).model(family), cached_inputs(family, prompt)
    logits = {"return_dict_in_generate": True, "output_logits": True}
    with torch.no_grad():
        return run(model, inputs, **logits), model(**inputs)


@lru_cache(1024)
def decided(family: str, spec: Spec, prompt: str) -> tuple[Tensor, Decision]:
    """What a first run of the method adds, and what it decided: others are compared with it."""
    with patched(spec, family) as decision:
        return run(spec.model(family), cached_inputs(family, prompt)), decision()


def run_fed(model: Any, given: Fed, **options: Any) -> Tensor:
    """The tokens that the stock generate adds to embeddings."""
    with deepstack(model, given):
        return run(model, arguments(given), **options)


@contextmanager
def later_masks(
    model: Any, family: str, inputs: Inputs, later: Mapping[int, Selection], weighed: bool = False
) -> Iterator[None]:
    """Within it decoder layers behind each cut do not attend to what it dropped, and see what it
    merged, by its size if it is `weighed`."""
    with ExitStack() as stack:
        for layer, selection in later.items():
            if selection.merge is not None:
                given = model, family, inputs, layer + 1, selection
                stack.enter_context(merged_at_layer(*given))
            kept = kept_columns(model, family, inputs, selection)
            stack.enter_context(masked_from_layer(model, layer + 1, kept))
            if weighed and selection.merge is not None:
                size = sizes(model, family, inputs, selection)
                stack.enter_context(weighed_from_layer(model, layer + 1, size))
        yield


@contextmanager
def inside(spec: Spec, family: str, inputs: Inputs, decision: Decision) -> Iterator[Record | None]:
    """Within it decoder layers of the stock model do what the method says of them."""
    model = spec.model(family)
    with ExitStack() as stack:
        if not spec.over_layers:
            weighed = spec.name in WEIGHED
            given = model, family, inputs, decision.later, weighed
            stack.enter_context(later_masks(*given))
            yield None
            return
        for layer, kept in spec.cuts(family, inputs).items():
            stack.enter_context(masked_from_layer(model, layer, kept))
        prompt = prompt_of(model, family, inputs)
        yield stack.enter_context(restated(model, prompt, spec.rules(family)))


def statement(
    model: Any, spec: Spec, family: str, inputs: Inputs, decision: Decision
) -> tuple[Fed, Tensor]:
    """What the language model gets in full length, and which columns of it `[B, S]`."""
    method = spec.method(family)
    if method.site == "encoder":
        given = fed(model, inputs, decision.said)
    else:
        given = fed(model, inputs)
        if spec.name in STATEMENTS:
            return STATEMENTS[spec.name](model, family, inputs, given, spec.keep)
    assert decision.first is not None
    if plain_slots.has_slots(decision.first):
        return plain_slots.laid_out(model, family, inputs, given, decision.first)
    if decision.first.merge is not None:
        return plain.merged(model, family, inputs, given, decision.first)
    return given, kept_columns(model, family, inputs, decision.first)


def by_mask(spec: Spec, family: str) -> bool:
    """Whether the whole model with a mask is the oracle, its layers stock or as stated."""
    return spec.over_layers or spec.method(family).exactness in ("mask", "layer_mask")


def want(spec: Spec, family: str, inputs: Inputs, decision: Decision, mode: str) -> Tensor:
    """What the oracle of the method's declared exactness adds."""
    model, options = spec.model(family), MODES[SAME_AS.get(mode, mode)]
    with rows_expanded_by_hand(model, family), inside(spec, family, inputs, decision):
        if by_mask(spec, family):
            assert decision.first is not None
            return run(model, masked(model, family, inputs, decision.first), **options)
        given, kept = statement(model, spec, family, inputs, decision)
        return run_fed(model, given.masked(kept), **options)


def cells(*axes: Sequence[Any], full: Sequence[str] = FULL) -> list[Any]:
    """Every family with every combination of the axes; slow, beyond those that the default run
    covers: the families of `full` with all but further options of a method and `COMPOSED_ONLY`,
    but of a third axis one value by turns; of the others each value of each axis once; further
    options of methods over layers in every fourth family, `COMPOSED_ONLY` in every second."""
    further = {spec for name in VARIANTS for spec in specs_of(name)[1:]}
    out = []
    for f, family in enumerate(FAMILIES):
        chosen = _pairs(f, *axes)
        for cell in _combinations(axes):
            more = further & set(cell)
            composed = [s for s in cell if isinstance(s, Spec) and s.name in COMPOSED_ONLY]
            fully = family in full and not more and not composed and _in_turn(cell, axes)
            by_turns = all((f + SPECS.index(spec)) % 4 == 0 for spec in more if spec.over_layers)
            by_turns &= all((f + SPECS.index(spec)) % 2 == 0 for spec in composed)
            marks = () if fully or (cell in chosen and by_turns) else (pytest.mark.slow,)
            out.append(pytest.param(family, *cell, marks=marks))
    return out


def _combinations(axes: Sequence[Sequence[Any]]) -> list[tuple[Any, ...]]:
    found: list[tuple[Any, ...]] = [()]
    for axis in axes:
        found = [(*cell, value) for cell in found for value in axis]
    return found


def _in_turn(cell: Sequence[Any], axes: Sequence[Sequence[Any]]) -> bool:
    """Whether the values of axes behind the second are those whose turn it is."""
    at = [list(axis).index(value) for value, axis in zip(cell, axes, strict=True)]
    return all(at[a] == sum(at[:2]) % len(axes[a]) for a in range(2, len(axes)))


def _pairs(shift: int, *axes: Sequence[Any]) -> set[tuple[Any, ...]]:
    most = max(map(len, axes))
    return {
        tuple(axis[(i + a * shift) % len(axis)] for a, axis in enumerate(axes)) for i in range(most)
    }
